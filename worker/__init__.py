"""How a job is run: claim, context, handlers, house-keeping."""
