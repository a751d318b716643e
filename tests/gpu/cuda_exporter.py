"""Exports a tiny model's CUDA weights as vLLM's plugin does, then answers questions on its standard input.

    python cuda_exporter.py MODEL_DIR RUNTIME_DIR

`sum NAME`: the live sum of a parameter. Ends when its input does.
"""

import os
import sys
import time
import uuid
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hogwild.manifest import Manifest, TensorRecord, manifest_path
from hogwild.runtime_files import boot_id, private_dir, process_start_time
from hogwild.tensors import digest
from hogwild.vllm_plugin import export
from hogwild.vllm_plugin.cuda_export import gpu_uuid
from hogwild.weight_state import FILE_NAME, WeightState


def main() -> None:
    model_dir, runtime_dir = Path(sys.argv[1]), private_dir(Path(sys.argv[2]))
    device = torch.device("cuda", int(os.environ.get("EXPORT_DEVICE", "0")))
    torch.cuda.set_device(device)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    resolved = {
        name: export.Resolved(view=view, record=TensorRecord(
            status="shared", shape=tuple(view.shape), stride=tuple(view.stride()), dtype="bfloat16", parameter=name,
            hash=digest(view), full_shape=tuple(view.shape)))
        for name, view in parameters.items()
    }  # fmt: skip
    memory = export.place(resolved, device, None)
    assert memory.gpu_uuid == gpu_uuid(device)
    config, pid, export_id = AutoConfig.from_pretrained(model_dir), os.getpid(), uuid.uuid4().hex
    WeightState.create(runtime_dir / FILE_NAME, export_id)
    Manifest(
        export_id=export_id, model_path=str(model_dir), served_model_name="tiny", vllm_version="test", pid=pid,
        process_start_time=process_start_time(pid), boot_id=boot_id(), device="cuda", gpu_uuid=memory.gpu_uuid,
        max_model_len=64, vocab_size=config.vocab_size, dtype="bfloat16", created_at=time.time(),
        allocations=tuple(memory.allocations), tensors=memory.records,
    ).write(manifest_path(runtime_dir))  # fmt: skip
    print("exported", flush=True)
    for line in sys.stdin:
        torch.cuda.synchronize()
        print(parameters[line.split()[1]].float().sum().item(), flush=True)


if __name__ == "__main__":
    main()
