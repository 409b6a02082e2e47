"""The cost model: how long a plan's prefill and decoding take on a machine, and what limits them.

Every figure about the machine comes from its description (offload/machine.py), none from a run of the model.

    a matrix on the CPU   its blocks of 16 x 128 weights, each as long as one from memory takes for so many tokens,
                          shared out over the cores; and its kernel's beginning and end
    experts on the CPU    the same for each that is touched: E (1 - (1 - K/E)^T) of E, for T tokens of K experts each;
                          gate and up, and down, by the blocks of their own formats
    attention on the CPU  blocks of wkv_b, and multiplications of the form that runs, by their time
    small steps           kernels, and values that they move; operators' own work, but of layers in decoding, which are
                          recorded
    on a GPU              the larger of bytes by its bandwidth and operations by its rate, at the shares below
    streamed experts      the slowest of host memory (written once, read twice), PCIe, the GPU and the queuing of its
                          calls; and the first slice's way, which nothing hides
    a layer with both     the CPU's experts beside the GPU's shared expert and its own experts: the longer one counts;
                          deferred experts beside the next layer's attention, too

The shares and times of a GPU are assumptions; nothing has been measured on one yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from offload.machine import Machine, MachineGpu, Points, block_ns
from offload.plan import DECODED, Placement, Plan, Streaming, is_streamable
from offload.workspace import ABSORBED_UP_TO, PREFILL_BLOCK, TOKENS_ON_DEVICE
from quant.config import ModelConfig
from quant.gpu import shapes
from quant.inventory import cache_row_bytes
from quant.packed import BLOCK_K, EXPERT_FORMATS, PACKED_FORMATS, TILE_ROWS

PROMPT = 4096  # tokens of the prompt whose prefill is predicted, if the context holds them
BLOCK = TILE_ROWS * BLOCK_K
PLAIN = "f32"  # whose kernel serves all formats that are not packed
PLAIN_BLOCK_BYTES = {"bf16": 2 * BLOCK, "f32": 4 * BLOCK, "fp8_block": BLOCK}
CALLS_A_LAYER = 26  # small kernels, most of them conversions of activations
MATRICES_A_LAYER = 8
OPERATORS_A_LAYER = 20  # torch calls so many
OPERATORS_OF_EXPERTS, OPERATORS_A_TOKEN = 3, 8  # of a layer's experts alone; outside of layers
GPU_READ_SHARE, GPU_FLOP_SHARE = 0.75, 0.5  # of the data sheet
GPU_LAUNCHES_A_LAYER, GPU_LAUNCH_S = 25, 3e-6  # in recorded graphs
HANDOVER_S = 30e-6  # from GPU to CPU and back, for a layer's experts, beside the bytes
SLICE_CALLS, CALL_S = 25, 8e-6  # of torch and kernels, for some tokens and a slice of streamed experts; not recorded
STREAM_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens of a pass, from which streaming is tried

WORTH = 1.05  # what takes more memory is taken if it makes prefill so many times as fast

READING, COMPUTING, STEPS = "reading weights from RAM", "the processor's arithmetic", "small steps on the processor"
ATTENTION, GPU_READING, GPU_COMPUTING = "attention on the processor", "the GPU's memory", "the GPU's arithmetic"
CROSSING, QUEUING = "PCIe and handing over", "calls that queue the GPU's work"


class Times(dict[str, float]):
    """Seconds under each of the names above."""

    def add(self, more: "Times") -> None:
        """What comes after it."""
        for name, seconds in more.items():
            self[name] = self.get(name, 0.0) + seconds

    @property
    def seconds(self) -> float:
        return sum(self.values())

    @property
    def limit(self) -> str:
        """What takes the most."""
        return max(self, key=self.__getitem__)


@dataclass(frozen=True)
class Prediction:
    """prompt: tokens of the prefill that is predicted. position: of the token whose decoding is."""

    prompt: int
    prefill_tok_s: float
    prefill_limit: str
    position: int
    decode_tok_s: float
    decode_limit: str


@dataclass(frozen=True)
class Costs:
    """Of one model on one machine."""

    config: ModelConfig
    machine: Machine

    def predict(self, plan: Plan, prompt: int | None = None, position: int | None = None) -> Prediction:
        """By default: a prompt of 4096 tokens or half of the context, and the first token after it."""
        prompt = min(PROMPT, max(1, plan.context // 2)) if prompt is None else prompt
        position = prompt if position is None else position
        prefill, decode = self.prefill(plan, prompt), self.forward(plan, 1, position + 1)
        speeds = prompt / prefill.seconds, 1 / decode.seconds
        return Prediction(prompt, speeds[0], prefill.limit, position, speeds[1], decode.limit)

    def prefill_tok_s(self, plan: Plan) -> float:
        """Of the prompt that `predict` takes by default."""
        prompt = min(PROMPT, max(1, plan.context // 2))
        return prompt / self.prefill(plan, prompt).seconds

    def chunk_tok_s(self, plan: Plan) -> float:
        """Of one whole chunk, the last one of the prompt that `predict` takes by default."""
        seen = max(plan.prefill_chunk, min(PROMPT, max(1, plan.context // 2)))
        return plan.prefill_chunk / self.forward(plan, plan.prefill_chunk, seen).seconds

    def prefill(self, plan: Plan, prompt: int) -> Times:
        """All chunks of a prompt, and the logits of its last token."""
        total, done = Times(), 0
        while done < prompt:
            tokens = min(plan.prefill_chunk, prompt - done)
            done += tokens
            total = _sum(total, self.forward(plan, tokens, done))
        return total

    def forward(self, plan: Plan, tokens: int, seen: int) -> Times:
        """One pass of `tokens` tokens, the last of `seen`, and one token's logits."""
        total = Times()
        for (_, count), placements in self._layers(plan).items():
            one = self._layer(plan, placements, tokens, seen)
            total = _sum(total, Times({name: count * seconds for name, seconds in one.items()}))
        total.add(self._matrix(plan.placement(None, "head"), 1))
        return total if plan.on_gpu else _sum(total, self._outside(tokens))

    def _layers(self, plan: Plan) -> dict[tuple[int, int], list[Placement]]:
        """Layers that are alike only once: (the first one's number, how many there are)."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        by_layer = _by_layer(plan)
        for layer, placements in by_layer.items():
            kind = tuple((p.component, p.expert_count, p.tier, p.representation) for p in placements)
            kinds.setdefault(kind, []).append(layer)
        return {(layers[0], len(layers)): by_layer[layers[0]] for layers in kinds.values()}

    def _layer(self, plan: Plan, placements: list[Placement], tokens: int, seen: int) -> Times:
        kv_b = next(p for p in placements if p.component == "kv_b")
        before, beside, experts = Times(), Times(), Times()
        for placement in placements:
            if placement.component == "routed_expert":
                where = experts if placement.tier == "ram" else beside
                streaming = plan.streaming if placement.tier == "ram" and plan.streams(tokens) else None
                where.add(
                    self._experts(placement, tokens)
                    if streaming is None
                    else self._streamed(placement, streaming, tokens)
                )
            elif placement.component == "shared_expert":
                beside.add(self._matrix(placement, tokens))
            elif placement.component != "kv_b":
                before.add(self._matrix(placement, tokens))
        attention = self._gpu_attention if plan.on_gpu else self._attention
        before.add(attention(plan, kv_b, tokens, seen))
        before.add(self._steps(plan, placements, tokens))
        if not plan.on_gpu:
            return _sum(before, _sum(beside, experts))
        if experts and tokens <= DECODED and plan.deferred_experts:
            return self._deferring(before, beside, experts, plan.deferred_experts)
        if experts and not plan.streams(tokens):
            experts.add(self._crossing(tokens))
        return _sum(before, max(beside, experts, key=lambda times: times.seconds))

    def _deferring(self, before: Times, beside: Times, experts: Times, deferred: int) -> Times:
        """A layer among others that defer some of a token's experts: these run beside the next layer's attention.

        So a layer takes as long as the GPU's part with the experts that it waits for, or as all of its experts.
        """
        share = 1 - deferred / self.config.n_activated_experts
        waited = _sum(Times({name: share * seconds for name, seconds in experts.items()}), self._crossing(DECODED))
        chain = _sum(before, max(beside, waited, key=lambda times: times.seconds))
        return max(chain, experts, key=lambda times: times.seconds)

    def _matrix(self, placement: Placement, tokens: int) -> Times:
        """The matrices of a component."""
        if placement.tier == "gpu":
            values = BLOCK * placement.nbytes / block_bytes(placement.representation)
            return self._on_gpu(placement.nbytes, 2 * values * tokens)
        times = self.weights(self.machine.matrices, placement.representation, placement.nbytes, tokens)
        return _sum(times, self._results(tokens * self._rows(placement), self.machine.matrix_output_ns))

    def _rows(self, placement: Placement) -> int:
        """Results for a token of all matrices of a component."""
        config = self.config
        shared = config.n_shared_experts * config.moe_inter_dim
        rows = {
            "attention": config.q_lora_rank + config.n_heads * config.qk_head_dim + config.latent_dim + config.dim,
            "dense": 2 * config.inter_dim + config.dim,
            "shared_expert": 2 * shared + config.dim,
            "router": config.n_routed_experts,
            "head": config.vocab_size,
        }
        return rows.get(placement.component, 0)

    def weights(self, table: Mapping[str, Points], representation: str, nbytes: float, tokens: float) -> Times:
        """Weights on the CPU, each used by `tokens` tokens. table: of experts or of other matrices."""
        reading = nbytes / self.machine.read_bytes_s
        blocks = nbytes / block_bytes(representation)
        seconds = blocks * block_ns(_points(table, representation), tokens) * 1e-9 / self.machine.cores
        return Times({READING if 2 * reading >= seconds else COMPUTING: seconds})

    def experts(self, representation: str, record_bytes: float, touched: float, pairs: float) -> Times:
        """Routed experts of one layer on the CPU: `touched` different ones, for `pairs` of token and expert."""
        total = Times({STEPS: self.machine.experts_s})
        for name, share in _shares(representation):
            total.add(self.weights(self.machine.experts, name, share * touched * record_bytes, pairs / touched))
        outputs = pairs * (2 * self.config.moe_inter_dim + self.config.dim)
        return _sum(total, self._results(outputs, self.machine.expert_output_ns))

    def _results(self, count: float, each_ns: float) -> Times:
        return Times({COMPUTING: count * each_ns * 1e-9 / self.machine.cores})

    def experts_alone(self, representation: str, record_bytes: float, touched: float, pairs: float) -> Times:
        """The same in a call of their own, through torch."""
        called = Times({STEPS: OPERATORS_OF_EXPERTS * self.machine.eager_s})
        return _sum(called, self.experts(representation, record_bytes, touched, pairs))

    def _experts(self, placement: Placement, tokens: int) -> Times:
        """The part of a layer's experts that lives in one place; all are used alike."""
        total, top_k = self.config.n_routed_experts, self.config.n_activated_experts
        share = placement.expert_count / total
        touched = placement.expert_count * (1 - (1 - top_k / total) ** tokens)
        pairs, record = share * tokens * top_k, placement.nbytes / placement.expert_count
        if placement.tier == "ram":
            return self.experts(placement.representation, record, touched, pairs)
        operations = 6 * self.config.dim * self.config.moe_inter_dim * pairs
        return self._on_gpu(touched * record, operations)

    def _streamed(self, placement: Placement, streaming: Streaming, tokens: int) -> Times:
        """The part of a layer's experts that lives in RAM, sent to the GPU."""
        config, total, ram = self.config, self.config.n_routed_experts, self.machine.read_bytes_s
        link, count = self._gpu.to_gpu_bytes_s, placement.expert_count
        rounds, slices = ceil(tokens / TOKENS_ON_DEVICE), ceil(count / streaming.slice_experts)
        each = tokens / rounds * config.n_activated_experts / total  # pairs of an expert in a round
        padded = max(1.0, shapes.HIDDEN_MANY.m / each)
        pairs = count / total * tokens * config.n_activated_experts
        times = self._on_gpu(rounds * placement.nbytes, 6 * config.dim * config.moe_inter_dim * pairs * padded)
        others = {
            READING: 3 * placement.nbytes / ram,
            CROSSING: placement.nbytes / link,
            QUEUING: slices * rounds * SLICE_CALLS * CALL_S,
        }
        slowest = max((times, *(Times({name: s}) for name, s in others.items())), key=lambda one: one.seconds)
        first = placement.nbytes / slices * (2 / ram + 1 / link)
        return _sum(slowest, Times({CROSSING: first}))

    def layer_experts_s(self, plan: Plan, streaming: Streaming | None, tokens: int) -> float:
        """Seconds of a layer's experts that are in RAM, as many as any layer has there, computed there or streamed."""
        placements = (p for p in plan.placements if is_streamable(p, plan.n_layers))
        placement = max(placements, key=lambda p: p.expert_count)
        if streaming is not None:
            return self._streamed(placement, streaming, tokens).seconds
        return _sum(self._experts(placement, tokens), self._crossing(tokens)).seconds

    def stream_from(self, plan: Plan, slice_experts: int) -> int | None:
        """The fewest tokens of a pass whose experts are there sooner by streaming than on the CPU; None for never."""
        if not plan.on_gpu or not any(is_streamable(p, plan.n_layers) for p in plan.placements):
            return None
        for tokens in (length for length in STREAM_LENGTHS if length <= plan.prefill_chunk):
            streamed = self.layer_experts_s(plan, Streaming(tokens, slice_experts), tokens)
            if streamed < self.layer_experts_s(plan, None, tokens):
                return tokens
        return None

    def _attention(self, plan: Plan, kv_b: Placement, tokens: int, seen: int) -> Times:
        """On the CPU."""
        config, machine = self.config, self.machine
        times = Times()
        if tokens <= ABSORBED_UP_TO:
            both = config.qk_nope_head_dim + config.v_head_dim
            each = seen * (config.kv_lora_rank + config.latent_dim) + both * config.kv_lora_rank
            nanoseconds = machine.absorbed_ns * tokens * config.n_heads * each
            nanoseconds += machine.heads_ns * kv_b.nbytes / block_bytes(kv_b.representation)
        else:
            blocks = -(-seen // PREFILL_BLOCK)
            made = self.weights(machine.matrices, kv_b.representation, kv_b.nbytes, seen / blocks)
            times.add(Times({name: blocks * seconds for name, seconds in made.items()}))
            rows = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
            times.add(self._results(seen * rows, machine.matrix_output_ns))
            visible = seen - tokens / 2  # on average, as a token does not see those after it
            width = config.qk_head_dim + config.v_head_dim
            nanoseconds = machine.decompressed_ns * tokens * config.n_heads * visible * width
        if plan.cache_format == "int8":
            nanoseconds += machine.value_ns * seen * config.latent_dim
        return _sum(times, Times({ATTENTION: nanoseconds * 1e-9 / machine.cores}))

    def _gpu_attention(self, plan: Plan, kv_b: Placement, tokens: int, seen: int) -> Times:
        config = self.config
        cached = seen * cache_row_bytes(config, plan.cache_format)
        if tokens <= ABSORBED_UP_TO:
            each = seen * (config.kv_lora_rank + config.latent_dim)
        else:
            each = seen * (config.qk_head_dim + config.v_head_dim)
        values = BLOCK * kv_b.nbytes / block_bytes(kv_b.representation)
        uses = tokens if tokens <= ABSORBED_UP_TO else seen
        return self._on_gpu(cached + kv_b.nbytes, 2 * tokens * config.n_heads * each + 2 * values * uses)

    def _steps(self, plan: Plan, placements: list[Placement], tokens: int) -> Times:
        """Norms, sums, conversions, rotations, routing; where matrices begin; operators."""
        if plan.on_gpu:
            return Times({GPU_READING: GPU_LAUNCHES_A_LAYER * GPU_LAUNCH_S})
        machine, config = self.machine, self.config
        is_dense = any(placement.component == "dense" for placement in placements)
        inter = config.inter_dim if is_dense else config.n_shared_experts * config.moe_inter_dim
        values = 12 * config.dim + 2 * config.n_heads * (config.qk_head_dim + config.v_head_dim) + 5 * inter
        values += 3 * config.latent_dim + config.n_routed_experts
        seconds = CALLS_A_LAYER * machine.call_s + MATRICES_A_LAYER * machine.matrix_s
        if tokens > 1:
            seconds += OPERATORS_A_LAYER * machine.eager_s
        return Times({STEPS: seconds + tokens * values * machine.value_ns * 1e-9 / machine.cores})

    def _outside(self, tokens: int) -> Times:
        """Embedding, angles, logits, and the choice of a token from them."""
        values = tokens * self.config.dim + 2 * self.config.vocab_size
        seconds = OPERATORS_A_TOKEN * self.machine.eager_s + values * self.machine.value_ns * 1e-9
        return Times({STEPS: seconds})

    def _crossing(self, tokens: int) -> Times:
        """Experts' inputs to the host and outputs back."""
        down, up = 4 * self.config.dim + 12 * self.config.n_activated_experts, 4 * self.config.dim
        seconds = tokens * (down / self._gpu.to_host_bytes_s + up / self._gpu.to_gpu_bytes_s)
        return Times({CROSSING: HANDOVER_S + seconds})

    def _on_gpu(self, nbytes: float, operations: float) -> Times:
        reading = nbytes / (GPU_READ_SHARE * self._gpu.read_bytes_s)
        computing = operations / (GPU_FLOP_SHARE * self._gpu.flops)
        return Times({GPU_READING: reading} if reading >= computing else {GPU_COMPUTING: computing})

    @cached_property
    def _gpu(self) -> MachineGpu:
        assert self.machine.gpu is not None, "a plan with a GPU tier is predicted for a machine with a GPU"
        return self.machine.gpu


def with_waiting(machine: Machine, byte_ns: float) -> Machine:
    """The machine with weights in memory where a core waits so many ns longer for each byte."""

    def table(times: Mapping[str, Points]) -> dict[str, Points]:
        return {name: _later(points, block_bytes(name) * byte_ns) for name, points in times.items()}

    return replace(machine, experts=table(machine.experts), matrices=table(machine.matrices))


def _later(points: Points, ns: float) -> Points:
    return tuple((tokens, max(each / 2, each + ns)) for tokens, each in points)


def block_bytes(representation: str) -> int:
    """Bytes of 16 x 128 weights; of "a+b" those of the first."""
    name = representation.partition("+")[0]
    return PACKED_FORMATS[name].block_bytes if name in PACKED_FORMATS else PLAIN_BLOCK_BYTES[name]


def _shares(representation: str) -> tuple[tuple[str, float], ...]:
    """The formats of a routed expert's matrices, and their shares of its bytes: of gate and up, and of down."""
    if representation in PACKED_FORMATS or representation not in EXPERT_FORMATS:
        return ((representation, 1.0),)
    gate_up, down = EXPERT_FORMATS[representation]
    both = 2 * gate_up.block_bytes + down.block_bytes
    return (gate_up.name, 2 * gate_up.block_bytes / both), (down.name, down.block_bytes / both)


def _points(table: Mapping[str, Points], representation: str) -> Points:
    """The times that count for a format: those of its own, or of plain float32 for other plain ones."""
    name = representation.partition("+")[0]
    if name not in table:
        name = PLAIN if PLAIN in table else next(iter(table))
    return table[name]


def _by_layer(plan: Plan) -> dict[int, list[Placement]]:
    """The placements of each layer, MTP layers left out."""
    layers: dict[int, list[Placement]] = {}
    for placement in plan.placements:
        if placement.layer is not None and placement.layer < plan.n_layers:
            layers.setdefault(placement.layer, []).append(placement)
    return layers


def _sum(first: Times, second: Times) -> Times:
    """Both, one after the other."""
    total = Times(first)
    total.add(second)
    return total
