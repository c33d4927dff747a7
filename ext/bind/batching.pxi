# (see DESIGN.md)
