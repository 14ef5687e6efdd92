"""The papers' equations, each mechanism with its Edit, and what several of them share."""
