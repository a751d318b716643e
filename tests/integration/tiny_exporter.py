"""Stands where vLLM stands, for tests of the worker: exports the weights of a tiny model as the plugin does.

    python tiny_exporter.py MODEL_DIR RUNTIME_DIR

Uses the plugin's own arena, manifest, weight state and front end file; answers prefix cache resets and counts them in
RUNTIME_DIR/resets. Runs until it is killed.
"""

import json
import os
import sys
import time
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hogwild.frontend import Frontend
from hogwild.manifest import Allocation, Manifest, TensorRecord, manifest_path
from hogwild.runtime_files import boot_id, private_dir, process_start_time
from hogwild.tensors import digest
from hogwild.vllm_plugin.arena import rehome
from hogwild.weight_state import FILE_NAME, WeightState


def main() -> None:
    model_dir, runtime_dir = Path(sys.argv[1]), private_dir(Path(sys.argv[2]))
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    arena = rehome(model, "tiny")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    records = {}
    for name in load_file(model_dir / "model.safetensors"):
        view = parameters[name].data
        records[name] = TensorRecord(
            status="shared", shape=tuple(view.shape), dtype="float32", allocation=0, stride=view.stride(),
            offset=arena.offset_of(view.data_ptr()), parameter=name, hash=digest(view))  # fmt: skip
    config = AutoConfig.from_pretrained(model_dir)
    export_id, pid = uuid.uuid4().hex, os.getpid()
    WeightState.create(runtime_dir / FILE_NAME, export_id)
    Manifest(
        export_id=export_id, model_path=str(model_dir), served_model_name="tiny", vllm_version="test", pid=pid,
        process_start_time=process_start_time(pid), boot_id=boot_id(), device="cpu",
        max_model_len=config.max_position_embeddings, vocab_size=config.vocab_size, dtype="float32",
        created_at=time.time(), tensors=records,
        allocations=(Allocation(kind="memfd", size=arena.size, pid=pid, fd=arena.fd, inode=arena.inode),),
    ).write(manifest_path(runtime_dir))  # fmt: skip

    resets = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal resets
            resets += 1
            (runtime_dir / "resets").write_text(str(resets))
            body = json.dumps({"reset": True}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Frontend(
        url=f"http://127.0.0.1:{server.server_port}", pid=pid, process_start_time=process_start_time(pid), token="t",
    ).write(runtime_dir)  # fmt: skip
    print("exported", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
