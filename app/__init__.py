"""What a job is, and how it is asked for. Nothing in here imports `worker`."""
