"""The whole stack as child processes of one command: `hogwild up`, `hogwild demo`, the acceptance tests.

Supervisor (the process manager) starts, watches, restarts and stops the services and rotates their logs; what is
here writes its configuration, asks it for states, prefixes the logs, and tells a person what happens.
"""
