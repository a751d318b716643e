"""The HTTP API: FastAPI routes over the job service. Never imports torch."""
