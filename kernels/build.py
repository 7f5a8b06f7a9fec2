"""From src/*.cu to a cubin: NVRTC compiles, and a file per variant remembers the result.

The key is a hash of everything that decides the code: the source and all headers, the macros, the architecture, the
options and the compiler's version. A file that does not match its own checksum is compiled again. Neither compiling
nor the cache needs a GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

SRC = Path(__file__).parent / "src"

# Without fused multiply-add elementwise arithmetic rounds as it does on the host; division is IEEE by default.
OPTIONS: dict[str, Any] = {"std": "c++17", "fma": False}

Defines = tuple[tuple[str, str], ...]


class Compiler(Protocol):
    """What turns a kernel source into a cubin."""

    @property
    def version(self) -> str: ...

    def compile(self, source: str, defines: Defines, arch: str) -> bytes: ...


class Nvrtc:
    """NVIDIA's runtime compiler, through cuda.core.

    Raises: ImportError where cuda.core is missing, RuntimeError or OSError where NVRTC does not load.
    """

    def __init__(self) -> None:
        self._core = importlib.import_module("cuda.core")
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        _, major, minor = nvrtc.nvrtcVersion()
        self.version = f"{major}.{minor}"
        self.archs = {f"sm_{arch}" for arch in nvrtc.nvrtcGetSupportedArchs()[1]}
        self.log = ""

    def compile(self, source: str, defines: Defines, arch: str) -> bytes:
        """Compile src/<source>.cu for one architecture; what ptxas says about it is left in `log`.

        Raises: RuntimeError with the compiler's messages.
        """
        options = self._core.ProgramOptions(
            name=f"{source}.cu",
            arch=arch,
            include_path=[str(SRC)],
            define_macro=list(defines) or None,
            ptxas_options=["-v"],
            **OPTIONS,
        )
        text = (SRC / f"{source}.cu").read_text(encoding="utf-8")
        log = io.StringIO()
        try:
            code: bytes = self._core.Program(text, "c++", options).compile("cubin", logs=log).code
        except Exception as err:  # cuda.core has a class of its own for this, and has renamed it
            raise RuntimeError(f"{source}.cu: expected NVRTC {self.version} to compile it for {arch}: {err}") from err
        self.log = log.getvalue()
        return code


def key(source: str, defines: Defines, arch: str, compiler: Compiler) -> str:
    """Return the hash that names the cubin."""
    headers = sorted(SRC.glob("*.cuh"))
    texts = {path.name: path.read_text(encoding="utf-8") for path in (SRC / f"{source}.cu", *headers)}
    parts = [texts, sorted(defines), arch, compiler.version, OPTIONS]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path | None:
    """Return where cubins are kept, or None where there is no home folder to keep them in."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification says to ignore a path that is not absolute.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fasttht" / "kernels"
    except RuntimeError:
        return None


def cubin(source: str, defines: Defines, arch: str, compiler: Compiler) -> bytes:
    """Return the code of one variant, from the cache if it is there and whole."""
    folder = cache_folder()
    path = folder / f"{source}-{arch}-{key(source, defines, arch, compiler)[:32]}.cubin" if folder else None
    code = _read(path) if path else None
    if code is None:
        code = compiler.compile(source, defines, arch)
        if path:
            _write(path, code)
    return code


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Put the file there whole or not at all; a folder that cannot be written only costs the next process time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        return
