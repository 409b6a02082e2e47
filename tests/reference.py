"""Independent references: what Hugging Face transformers computes from a small checkpoint, in float32.

    write_variant(tmp_path, "ragged", seed=7)
    make_reference(tmp_path, seed=7)                  # needs transformers
    load_stored("ragged")                             # does not
    python -m tests.reference                         # writes tests/data/reference anew

Weights are read and dequantised here once more, on purpose: a mistake in the project's reader must show.
"""

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import BF16, NO_MTP, NO_Q_LORA, RAGGED, TINY, Fields, tiny_config, tiny_tensors, write_files
from tests.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

STORED = Path(__file__).parent / "data" / "reference"
STORED_SEED = 11
STORED_ROWS = (0, 1, 40, 83)  # of 84 tokens; YaRN's original context ends within them
PROMPT_TOKENS, NEW_TOKENS = 64, 21
TIE = 3e-5  # nearer scores may be ordered either way in float32, so such prompts are not taken

OTHER_YARN = TINY["rope_scaling"] | {"factor": 8, "original_max_position_embeddings": 32}
VARIANTS: dict[str, Fields] = {
    # as R1 is published: FP8, low-rank queries, groups, YaRN 40, an MTP layer
    "published": {},
    # no dimension a multiple of 128; two dense layers, two shared experts, another mscale
    "ragged": RAGGED | {"rope_scaling": OTHER_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    # no quantisation, one query matrix; all choice scores are negative, see `write_variant`
    "bf16": BF16
    | NO_Q_LORA
    | NO_MTP
    | {"num_experts_per_tok": 6, "rope_scaling": OTHER_YARN | {"mscale_all_dim": 0.5}},
    # more embedding rows than tokens; neither groups, YaRN nor normalised weights; an eps that shows
    "plain": {"vocab_size": 640, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rms_norm_eps": 0.1}
    | {"rope_scaling": None, "num_hidden_layers": 2},
}


@dataclass(frozen=True)
class Reference:
    """Of a prompt and its greedy continuation, T tokens together. States are kept of the positions `rows` [R] only."""

    ids: torch.Tensor  # [T] the prompt and all of `greedy` but its last
    greedy: torch.Tensor  # [N]
    greedy_margins: torch.Tensor  # [N] best logit minus the second
    rows: torch.Tensor  # [R]
    logits: torch.Tensor  # [R, vocab]
    hidden: torch.Tensor  # [layers + 1, R, dim] after the embedding and each layer, before the final norm
    experts: torch.Tensor  # [moe_layers, T, K] sorted
    weights: torch.Tensor  # [moe_layers, T, K] as multiplied onto the experts' outputs
    mtp_logits: torch.Tensor | None  # [R', vocab] of those rows that have a next token

    @property
    def prompt(self) -> list[int]:
        return self.ids[: len(self.ids) - len(self.greedy) + 1].tolist()

    def thinned(self, rows: torch.Tensor) -> "Reference":
        """With the states of `rows` only, of a reference that has them all."""
        mtp = None if self.mtp_logits is None else self.mtp_logits[rows[rows < len(self.mtp_logits)]]
        return replace(self, rows=rows, logits=self.logits[rows], hidden=self.hidden[:, rows], mtp_logits=mtp)


def write_variant(folder: Path, variant: str, seed: int) -> Path:
    """Write a checkpoint of VARIANTS with its tokenizer."""
    config = tiny_config(VARIANTS[variant])
    tensors = tiny_tensors(config, seed)
    for name, tensor in tensors.items():
        if variant == "bf16" and name.endswith("e_score_correction_bias"):
            tensor -= 1  # so that masking the other groups with 0 instead of -inf prefers them
        if variant == "plain" and name.endswith(("embed_tokens.weight", "head.weight")):
            tensor[VOCAB_SIZE:] = 0  # as the published padding: logits of 0
    write_files(folder, config, tensors)
    write_tokenizer(folder)
    return folder


def load_transformers(folder: Path) -> Any:
    """DeepseekV3ForCausalLM of the dequantised weights; its attribute `mtp` is its MtpModel, or None."""
    from transformers import DeepseekV3ForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    layers = config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as twin:
        save_file(dequantised(folder), Path(twin) / "model.safetensors", metadata={"format": "pt"})
        (Path(twin) / "config.json").write_text(json.dumps(config))
        model, info = DeepseekV3ForCausalLM.from_pretrained(
            twin,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        unknown = [key for key in info["unexpected_keys"] if not key.startswith(f"model.layers.{layers}.")]
        assert not unknown and not info["missing_keys"] and not info["mismatched_keys"], info
        model.mtp = _load_mtp(model, layers) if config.get("num_nextn_predict_layers") else None
    return model.eval()


def _load_mtp(model: Any, layer: int) -> Any:
    """transformers' own module, whose pattern of names knows only R1's layer 61."""
    try:
        from transformers.modeling_layers import MtpModel
    except ImportError:
        return None
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*"]
    return MtpModel.from_pretrained(model).eval()


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in float32 under their published names."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = tensor.float()
        if name + "_scale_inv" in stored:
            blocks = stored[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            plain[name] *= blocks[: tensor.shape[0], : tensor.shape[1]]
    return plain


def make_reference(folder: Path, seed: int) -> Reference:
    """The reference of a random prompt, the first of a few whose routing float32 decides clearly."""
    model, rng = load_transformers(folder), torch.Generator().manual_seed(seed)
    for _ in range(20):
        prompt = torch.randint(0, VOCAB_SIZE, (PROMPT_TOKENS,), generator=rng)
        reference, margin = _run(model, prompt)
        if margin > TIE:
            return reference
    raise AssertionError("every prompt has a tie in its routing")


@torch.no_grad()
def _run(model: Any, prompt: torch.Tensor) -> tuple[Reference, float]:
    """The reference of a prompt, and the least margin of its routing."""
    greedy, decoder = _greedy(model, prompt), model.model
    ids = torch.cat([prompt, greedy[:-1]])
    gates, mtp_gates = _gates(decoder), [] if model.mtp is None else _gates(model.mtp)
    with _watched([decoder.embed_tokens, *decoder.layers, decoder.norm, *gates, *mtp_gates]) as kept:
        logits = model(ids[None], use_cache=False).logits[0]
        hidden = torch.cat([kept[module] for module in (decoder.embed_tokens, *decoder.layers)])
        mtp_logits = None if model.mtp is None else _mtp_logits(model, ids, kept[decoder.norm])
    routes = [_sorted_by_id(*kept[gate][1:]) for gate in gates]
    best = logits[-len(greedy) :].topk(2).values
    reference = Reference(
        ids=ids,
        greedy=greedy,
        greedy_margins=best[:, 0] - best[:, 1],
        rows=torch.arange(len(ids)),
        logits=logits,
        hidden=hidden,
        experts=torch.stack([experts for experts, _ in routes]),
        weights=torch.stack([weights for _, weights in routes]),
        mtp_logits=mtp_logits,
    )
    return reference, min(_routing_margin(gate, kept[gate][0]) for gate in [*gates, *mtp_gates])


def _gates(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "DeepseekV3TopkRouter"]


@contextmanager
def _watched(modules: list[Any]) -> Iterator[dict[Any, Any]]:
    """The latest output of each of `modules`."""
    kept: dict[Any, Any] = {}

    def keep(module: Any, _args: Any, output: Any) -> None:
        kept[module] = output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _greedy(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """NEW_TOKENS tokens, each with the cache of those before; the end of the sentence is a token like others."""
    cache, tokens = None, [prompt]
    for _ in range(NEW_TOKENS):
        out = model(tokens[-1][None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(out.logits[0, -1:].argmax(-1))
    return torch.cat(tokens[1:])


def _sorted_by_id(weights: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, order = experts.sort(-1)
    return experts, weights.gather(-1, order)


def _routing_margin(gate: Any, logits: torch.Tensor) -> float:
    """How far the worst chosen group or expert is from the best that was not, at the closest token."""
    choice = logits.sigmoid() + gate.e_score_correction_bias  # [T, E]
    groups = choice.unflatten(-1, (gate.num_group, -1))
    ranked = groups.topk(2).values.sum(-1).sort(descending=True)
    open_groups = torch.zeros_like(ranked.values, dtype=torch.bool)
    open_groups.scatter_(-1, ranked.indices[:, : gate.topk_group], True)
    within = groups.masked_fill(~open_groups[..., None], float("-inf")).flatten(-2).sort(descending=True).values
    return min(_margin_after(ranked.values, gate.topk_group), _margin_after(within, gate.top_k))


def _margin_after(ranked: torch.Tensor, taken: int) -> float:
    return (ranked[:, taken - 1] - ranked[:, taken]).min().item() if taken < ranked.shape[1] else float("inf")


def _mtp_logits(model: Any, ids: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Row i: the draft of token i + 2, from the final normed state of token i and the embedding of token i + 1."""
    from transformers.cache_utils import MtpCache

    cache = MtpCache(config=model.config.get_mtp_config())
    positions = torch.arange(1, len(ids))[None]
    return model.lm_head(model.mtp.forward_layer(0, final[:, :-1], positions, cache, input_ids=ids[None, 1:]))[0]


def digests(folder: Path) -> dict[str, str]:
    """Checksums of a checkpoint, and of random numbers, which torch may draw differently on another machine."""
    checkpoint = zlib.crc32((folder / "config.json").read_bytes())
    for _, tensor in sorted(dequantised(folder).items()):
        checkpoint = zlib.crc32(tensor.numpy().tobytes(), checkpoint)
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    return {"checkpoint": f"{checkpoint:08x}", "random": f"{zlib.crc32(numbers.numpy().tobytes()):08x}"}


def store(reference: Reference, path: Path, metadata: dict[str, str]) -> None:
    """Write `reference` with the digests of its checkpoint."""
    tensors = {field.name: getattr(reference, field.name) for field in fields(reference)}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata=metadata)


def load_stored(variant: str) -> tuple[Reference, dict[str, str]]:
    """The stored reference of `variant`, and the digests of the checkpoint it is of."""
    with safe_open(STORED / f"{variant}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return Reference(**{"mtp_logits": None} | tensors), file.metadata()


def write_stored(report: Callable[[str], None] = print) -> None:
    """Write the references of all variants anew."""
    STORED.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as name:
            folder = write_variant(Path(name), variant, STORED_SEED)
            reference = make_reference(folder, STORED_SEED).thinned(torch.tensor(STORED_ROWS))
            path = STORED / f"{variant}.safetensors"
            store(reference, path, digests(folder))
        report(f"{path.name}: {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_stored()
