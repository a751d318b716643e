"""One tensor-parallel rank of vLLM's loader: exports its part, says so, and stays until its input is closed.

    python vllm_rank.py RANK SIZE STORE_FILE MODEL_DIR RUNTIME_DIR
"""

import os
import sys

RANK, SIZE, STORE, MODEL, RUNTIME = sys.argv[1:]
os.environ.update(HOGWILD_RUNTIME_DIR=RUNTIME, VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1",
                  HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_DIST_IDENT=f"hogwild{os.getppid()}")  # fmt: skip

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop  # noqa: E402

_set_torch_accelerator_to_noop()
registry._run_in_subprocess = lambda function: function()
config = EngineArgs(model=MODEL, served_model_name=["tp"], dtype="float32", enforce_eager=True, max_model_len=128,
                    skip_tokenizer_init=True, tensor_parallel_size=int(SIZE)).create_engine_config()  # fmt: skip
with set_current_vllm_config(config):
    init_distributed_environment(int(SIZE), int(RANK), f"file://{STORE}", int(RANK), "gloo")
    initialize_model_parallel(int(SIZE), 1)
    model = get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
print("exported", flush=True)
sys.stdin.read()
