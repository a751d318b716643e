"""The job service: Celery app, job ledger, payload store, debounce of syncs. Never imports torch."""
