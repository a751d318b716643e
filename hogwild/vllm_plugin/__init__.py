"""The plugin that vLLM finds by entry point: it lets a worker share the weights that vLLM serves.

`hooks` holds everything that touches vLLM's internals; `trace`, `arena`, `cuda_export`, `digest` and `export` know
torch but not vLLM; `endpoint` adds the routes on vLLM's own port. See docs/sharing.md.
"""


def register() -> None:
    """Called by vLLM in each of its processes: installs the hooks. Never raises, so that vLLM always serves."""
    import logging

    try:
        from hogwild.vllm_plugin import hooks

        hooks.install()
    except Exception:
        logging.getLogger("vllm.hogwild").exception("the hogwild plugin could not start: vLLM serves, training is off")
