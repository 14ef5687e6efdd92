"""How edits come into one run of a host model, and how amended attentions are computed."""
