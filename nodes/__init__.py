"""The pack's nodes: what people see. No tensor maths here."""
