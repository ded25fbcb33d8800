"""Frame of every kit: clauses, subjects, and the declarations of a component."""
