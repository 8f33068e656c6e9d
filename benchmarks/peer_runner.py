"""One peer in a process of its own: loads one model, then answers requests in JSON lines until stdin ends.

    python peer_runner.py LIBRARY VARIANT --model DIR --threads N --device cpu
    python peer_runner.py LIBRARY VARIANT --convert FLOAT_DIR --model NEW_DIR

Problem: libraries need versions that exclude each other, and memory can only be told apart by process. Method: this
file runs in any peer's Python; it imports the standard library, then what its peer needs and nothing else, since the
resident memory it reports is that of the whole process. Rejected: time around the request in the parent, which adds
the pipe, and measures conversion of token ids that is no part of the work.

    ready    {"load_s", "version", memory}                  once the model is loaded
    request  {"inputs": FILE, "mode", "beams", "tokens", "reset"}
    answer   {"ms", "ids", "lengths", memory}               ids: generated, without start token; of an encoder
    or       {"error": "one line"}                          "vectors": last hidden state, averaged over the tokens

FILE holds a JSON list of rows of token ids, of one length. `reset` starts the peak memory anew. Memory is
`resident_mib` and `peak_mib` of /proc/self/status, and `device_peak_mib` on a GPU. ms: CUDA events there, else
wall clock.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

MIB = 2**20


class Runner(Protocol):
    """A loaded model. `prepare` makes the call that is timed; `read` turns what it returned into an answer."""

    def prepare(self, rows: list[list[int]], mode: str, beams: int, tokens: int) -> Callable[[], Any]: ...

    def read(self, result: Any, mode: str) -> dict[str, Any]: ...


class TorchRunner:
    """Anything with transformers' interface: transformers, dqbart and optimum."""

    def __init__(self, model: Any, device: str = "cpu", **options: Any) -> None:
        self.model, self.device, self.options = model, device, options

    def prepare(self, rows: list[list[int]], mode: str, beams: int, tokens: int) -> Callable[[], Any]:
        import torch

        ids_BL = torch.tensor(rows, device=self.device)
        inputs = dict(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
        if mode != "forward":
            length = dict(min_new_tokens=tokens, max_new_tokens=tokens)
            return lambda: self.model.generate(**inputs, **length, num_beams=beams, do_sample=False, **self.options)

        def forward() -> Any:
            with torch.inference_mode():
                return self.model(**inputs).last_hidden_state

        return forward

    def read(self, result: Any, mode: str) -> dict[str, Any]:
        if mode == "forward":
            return {"vectors": result.float().mean(1).tolist(), "lengths": [result.shape[1]] * result.shape[0]}
        return generated(result[:, 1:].tolist(), self.model.generation_config.eos_token_id)


class CTranslate2Runner:
    """CTranslate2 takes and gives tokens; their translation from and to ids isn't timed."""

    def __init__(self, folder: Path, variant: str, threads: int, device: str) -> None:
        import ctranslate2  # type: ignore[import-not-found]

        options = dict(device=device, compute_type=variant, inter_threads=1, intra_threads=threads)
        config = json.loads((folder / "config.json").read_text())
        shared = [folder / name for name in ("shared_vocabulary.json", "vocabulary.json")]
        self.tokens = json.loads(next(file for file in shared if file.exists()).read_text())
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        # Where the model knows no start token (mBART), the caller gives one; it doesn't come back.
        self.prefix = None if config.get("decoder_start_token") else [config.get("eos_token")]
        self.seq2seq = "decoder_start_token" in config
        self.model = getattr(ctranslate2, "Translator" if self.seq2seq else "Encoder")(str(folder), **options)

    def prepare(self, rows: list[list[int]], mode: str, beams: int, tokens: int) -> Callable[[], Any]:
        if mode == "forward":
            return lambda: self.model.forward_batch(rows)
        source = [[self.tokens[i] for i in row] for row in rows]
        prefix = [self.prefix] * len(rows) if self.prefix else None
        length = dict(min_decoding_length=tokens, max_decoding_length=tokens)  # neither counts the end token
        return lambda: self.model.translate_batch(source, target_prefix=prefix, beam_size=beams, **length)

    def read(self, result: Any, mode: str) -> dict[str, Any]:
        if mode == "forward":
            import numpy as np

            hidden_BLD = np.array(result.last_hidden_state)
            return {"vectors": hidden_BLD.mean(1).tolist(), "lengths": [hidden_BLD.shape[1]] * hidden_BLD.shape[0]}
        return generated([[self.ids[token] for token in one.hypotheses[0]] for one in result], None)


def generated(rows: list[list[int]], eos: int | None) -> dict[str, Any]:
    """Ids, and how many there are before the first end token."""
    return {"ids": rows, "lengths": [row.index(eos) if eos in row else len(row) for row in rows]}


Loader = tuple[tuple[str, ...], Callable[[], Runner]]  # packages to name, and what is timed as loading


def ctranslate2_loader(variant: str, folder: Path, threads: int, device: str) -> Loader:
    import ctranslate2  # noqa: F401

    return ("ctranslate2",), lambda: CTranslate2Runner(folder, variant, threads, device)


def onnxruntime_loader(variant: str, folder: Path, threads: int, device: str) -> Loader:
    import onnxruntime  # type: ignore[import-not-found]
    from optimum import onnxruntime as optimum  # type: ignore[import-not-found]

    limit_threads(threads)
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads, session.inter_op_num_threads = threads, 1
    model_class(folder)
    cls, options = optimum.ORTModelForFeatureExtraction, dict[str, Any](file_name="model_quantized.onnx")
    if (folder / "encoder_model_quantized.onnx").exists():
        parts = ("encoder", "decoder", "decoder_with_past")
        cls, options = (
            optimum.ORTModelForSeq2SeqLM,
            {f"{one}_file_name": f"{one}_model_quantized.onnx" for one in parts},
        )
        options["use_merged"] = False
    packages = ("onnxruntime", "optimum-onnx", "transformers")
    return packages, lambda: TorchRunner(cls.from_pretrained(folder, session_options=session, **options))


def version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH alone
        return str(getattr(sys.modules.get(name), "__version__", "unknown"))


def dqbart_loader(variant: str, folder: Path, threads: int, device: str) -> Loader:
    import dqbart

    limit_threads(threads)
    model_class(folder)
    packages = ("dqbart", "torch", "transformers")
    return packages, lambda: TorchRunner(dqbart.load(folder, engine=variant, device=device), device)


def transformers_loader(variant: str, folder: Path, threads: int, device: str) -> Loader:
    import torch

    limit_threads(threads)
    cls = model_class(folder)

    def load() -> Runner:
        dtype = torch.float32 if variant == "compiled" else getattr(torch, variant)
        model = cls.from_pretrained(folder, dtype=dtype).to(device).eval()
        return TorchRunner(model, device, **(compiled(model) if variant == "compiled" else {}))

    return ("transformers", "torch"), load


LOADERS: dict[str, Callable[[str, Path, int, str], Loader]] = {
    "transformers": transformers_loader,
    "ctranslate2": ctranslate2_loader,
    "onnxruntime": onnxruntime_loader,
    "dqbart": dqbart_loader,
}


def limit_threads(threads: int) -> None:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    transformers.logging.set_verbosity_error()


def model_class(folder: Path) -> Any:
    """The class named in config.json, imported before the clock runs."""
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def compiled(model: Any) -> dict[str, Any]:
    """Compile what is called, in place, and return options for `generate`.

    A cache of fixed size keeps the decoder's shapes the same from step to step.
    """
    import torch

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on uncompiled, silently
    model.forward = torch.compile(model.forward)
    if not model.can_generate():
        return {}
    encoder = model.get_encoder()
    encoder.forward = torch.compile(encoder.forward)
    return {"cache_implementation": "static", "disable_compile": True}  # which is transformers' own, on GPUs


def convert(library: str, variant: str, source: Path, target: Path) -> None:
    """Make the library's own files from a float model. Variant: of dqbart the bits, else the quantization."""
    if library == "dqbart":
        from dqbart.packed.checkpoint import save_packed
        from dqbart.quant.layers import prepare

        model = model_class(source).from_pretrained(source)
        save_packed(prepare(model, variant), target)
        return
    if library == "ctranslate2":
        from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

        TransformersConverter(str(source)).convert(str(target), quantization=variant, force=True)
        return
    import shutil

    from optimum import onnxruntime as optimum

    graphs = target / "float"
    if (source / "generation_config.json").exists():
        model = optimum.ORTModelForSeq2SeqLM.from_pretrained(source, export=True, use_merged=False)
    else:
        model = optimum.ORTModelForFeatureExtraction.from_pretrained(source, export=True)
    model.save_pretrained(graphs)
    del model
    flags = Path("/proc/cpuinfo")
    vnni = flags.exists() and "avx512_vnni" in flags.read_text().split()
    presets = optimum.AutoQuantizationConfig
    preset = presets.avx512_vnni if vnni else presets.avx2
    for file in sorted(graphs.glob("*.onnx")):
        optimum.ORTQuantizer.from_pretrained(graphs, file_name=file.name).quantize(
            save_dir=target,
            quantization_config=preset(is_static=False, per_channel=True),
            use_external_data_format=file.with_name(file.name + "_data").exists(),
        )
    for extra in graphs.glob("generation_config.json"):
        shutil.copy(extra, target)
    shutil.rmtree(graphs)


def memory(device: str) -> dict[str, float]:
    """Resident and peak memory of this process, MiB."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    status = {name: value for name, value in lines}
    kib = {name: float(status[field].split()[0]) for name, field in (("resident", "VmRSS"), ("peak", "VmHWM"))}
    found = {f"{name}_mib": round(value / 1024, 1) for name, value in kib.items()}
    if device == "cuda":
        import torch

        found["device_peak_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
    return found


def reset_peak(device: str) -> None:
    with suppress(OSError):  # where the kernel doesn't allow it, the peak is that since the start: never too small
        Path("/proc/self/clear_refs").write_text("5")
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def clocked(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(milliseconds, what the call returned)."""
    if device != "cuda":
        begin = time.perf_counter()
        result = call()
        return 1000 * (time.perf_counter() - begin), result
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), result


def answer(runner: Runner, request: dict[str, Any], device: str) -> dict[str, Any]:
    rows = json.loads(Path(request["inputs"]).read_text())
    if request["reset"]:
        reset_peak(device)
    call = runner.prepare(rows, request["mode"], request["beams"], request["tokens"])
    ms, result = clocked(call, device)
    return {"ms": ms} | memory(device) | runner.read(result, request["mode"])


def one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=list(LOADERS))
    parser.add_argument("variant", help="dtype, 'compiled', quantization or engine; with --convert dqbart's bits")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--convert", type=Path, metavar="FLOAT_DIR", help="make --model from this, then end")
    args = parser.parse_args()
    if args.convert:
        convert(args.library, args.variant, args.convert, args.model)
        return 0
    with suppress(OSError):  # where memory runs out, let it be this process that ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with replies

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        packages, load = LOADERS[args.library](args.variant, args.model, args.threads, args.device)
        start = time.perf_counter()
        runner = load()
        load_s = time.perf_counter() - start
        version = ", ".join(f"{name} {version_of(name)}" for name in packages)
    except Exception as error:  # whatever a library raises is this peer's result
        say({"error": one_line(error)})
        return 1
    say({"load_s": load_s, "version": version} | memory(args.device))
    for line in sys.stdin:
        try:
            say(answer(runner, json.loads(line), args.device))
        except Exception as error:
            say({"error": one_line(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
