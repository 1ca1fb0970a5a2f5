"""The network: transformers' numbers, precision, the slot, the cache, generation, packing."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import MINI, refused, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

import llama
from llama import KVCache, PairIds, generate, load, pack, read_config

SIZES = dict(
    hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=80,
    vocab_size=120, max_position_embeddings=256, initializer_range=0.2,
)  # fmt: skip
VARIANTS = {
    "mha": ("Llama", dict(num_key_value_heads=6)),
    "gqa": ("Llama", dict(num_key_value_heads=2)),
    "mqa, tied": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "head_dim": ("Llama", dict(head_dim=20, num_key_value_heads=3)),
    "rope_theta, eps": ("Llama", dict(rms_norm_eps=1e-3, rope_theta=5e5)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, rope_theta=1e6)),
    "mistral, window": ("Mistral", dict(num_key_value_heads=2, sliding_window=100)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=20)),
    "qwen3, tied": ("Qwen3", dict(num_key_value_heads=3, head_dim=8, tie_word_embeddings=True)),
    "qwen3, biases": ("Qwen3", dict(num_key_value_heads=2, head_dim=20, attention_bias=True)),
    "biases": ("Llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "mlp_bias": ("Llama", dict(num_key_value_heads=2, mlp_bias=True)),
}


@pytest.fixture(params=VARIANTS)
def twins(request, tmp_path):
    """The same random checkpoint in transformers and here."""
    family, fields = VARIANTS[request.param]
    fields = dict(fields)
    theta = fields.pop("rope_theta", 1e4)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**SIZES, **fields)
    theirs = getattr(transformers, family + "ForCausalLM")(config).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        if "norm" in name or "bias" in name:  # 1 and 0 at first, which would test no place
            weight.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    return theirs, load(tmp_path)


# ---- the same numbers as transformers


def test_logits_and_hidden_states(twins):
    theirs, ours = twins
    tokens = tokens_of(2, 50)
    out = theirs(tokens, output_hidden_states=True)
    assert (ours(tokens) - out.logits).abs().max() <= 1e-4
    h = ours.embed(tokens)
    for layer in range(3):  # transformers' last hidden state is after the final norm
        h = ours.blocks(h, layer, layer + 1)
        assert (h - out.hidden_states[layer + 1]).abs().max() <= 1e-4


def test_greedy_ids(twins):
    theirs, ours = twins
    prompts = tokens_of(2, 12)
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False,
        eos_token_id=[], pad_token_id=0,
    )  # fmt: skip
    assert generate(ours, prompts.tolist(), 64, eos_id=-1) == expected[:, 12:].tolist()


def test_slot_equals_a_forward_hook(twins):
    theirs, ours = twins
    tokens, v = tokens_of(2, 20), torch.randn(48, generator=torch.Generator().manual_seed(1))
    hook = theirs.model.layers[2].register_forward_hook(
        lambda module, args, out: out[0] + v if isinstance(out, tuple) else out + v
    )
    steered = theirs(tokens).logits
    hook.remove()
    assert (ours(tokens, steer={2: v}) - steered).abs().max() <= 1e-4
    assert (steered - theirs(tokens).logits).abs().max() > 0.1


def test_rotary_embedding_is_a_complex_rotation():
    config = replace(read_config(MINI), head_dim=8, rope_theta=10000.0)
    positions = torch.tensor([0, 1, 5, 300])
    x = torch.randn(2, 3, 4, 8)
    turned = llama.rotate(x, *llama.rope_tables(positions, config, torch.float32))
    freqs = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(4, 4), positions[:, None] * freqs)
    z = torch.complex(x[..., :4], x[..., 4:]) * turn
    assert torch.allclose(turned, torch.cat((z.real, z.imag), -1), atol=1e-5)


# ---- precision


class Dtypes(TorchDispatchMode):
    """Collects the floating-point dtypes of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.found.add(x.dtype)
        return out


def test_fp64_stays_fp64_in_every_operation(vector):
    model = load(MINI, torch.float64)
    with Dtypes() as dtypes:
        logits = model(tokens_of(2, 9), steer={1: vector.double()})
    assert logits.dtype == torch.float64 and dtypes.found == {torch.float64}


def test_fp64_logits_are_transformers(monkeypatch):
    """Their norms and rotary tables are fp32 in any model: here they are made anew in fp64."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float64).eval()
    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(32, module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            monkeypatch.setattr(module, "forward", norm.forward)

    def rotary_tables(x, position_ids):
        angle = position_ids[..., None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    monkeypatch.setattr(theirs.model.rotary_emb, "forward", rotary_tables)
    tokens = tokens_of(2, 100)
    difference = load(MINI, torch.float64)(tokens) - theirs(tokens).logits
    assert difference.abs().max() <= 1e-12


def test_bf16_model_has_fp32_rotary_tables_norms_and_logits():
    model = load(MINI, dtype=torch.bfloat16).to(torch.bfloat16)
    assert {w.dtype for w in model.state_dict().values()} == {torch.bfloat16}
    with Dtypes() as tables:
        llama.rope_tables(torch.arange(4), model.config, llama.wide(torch.bfloat16))
    assert tables.found == {torch.float32}
    x = torch.randn(3, 32).bfloat16()
    expected = torch.nn.functional.rms_norm(x.float(), (32,), eps=model.config.norm_eps)
    assert torch.equal(model.norm(x), expected.bfloat16() * model.norm.weight)
    assert model(tokens_of(1, 4)).dtype == torch.float32


# ---- the slot


def test_below_at_and_above_the_layer(mini, vector):
    model, _ = mini
    tokens = tokens_of(1, 9)
    plain = steered = model.embed(tokens)
    for layer in range(4):
        plain = model.blocks(plain, layer, layer + 1)
        steered = model.blocks(steered, layer, layer + 1, steer={1: vector})
        if layer < 1:
            assert torch.equal(steered, plain)
        elif layer == 1:
            assert torch.equal(steered, plain + vector)
        else:
            assert (steered - plain).abs().max() > 0.1


def test_zero_vector_is_bitwise_nothing(mini, vector):
    model, _ = mini
    tokens = tokens_of(2, 9)
    assert torch.equal(model(tokens, steer={1: 0 * vector}), model(tokens))


def test_bf16_stream_takes_an_fp32_vector_without_rounding_it_first(vector):
    model = load(MINI, dtype=torch.bfloat16)
    h = model.blocks(model.embed(tokens_of(1, 5)), 0, 2)
    steered = model.blocks(model.embed(tokens_of(1, 5)), 0, 2, steer={1: vector})
    assert torch.equal(steered, (h.float() + vector).bfloat16())


def test_forward_and_generation_steer_by_add_vector_alone(mini, vector, monkeypatch):
    model, _ = mini
    tokens, steer = tokens_of(2, 9), {1: vector, 3: -vector}
    prompts = tokens.tolist()
    plain, steered = model(tokens), model(tokens, steer=steer)
    plain_ids, steered_ids = (generate(model, prompts, 8, -1, x) for x in ({}, steer))
    assert (steered - plain).abs().max() > 0.1 and steered_ids != plain_ids
    monkeypatch.setattr(llama, "add_vector", lambda h, v: h)
    assert torch.equal(model(tokens, steer=steer), plain)
    assert generate(model, prompts, 8, -1, steer) == plain_ids


def test_every_position_is_steered_in_prompt_and_answer(mini, vector, monkeypatch):
    model, _ = mini
    calls, add_vector = [], llama.add_vector

    def record(h, v):
        calls.append((h.shape[1], torch.equal(v, vector.expand_as(v))))
        return add_vector(h, v)

    monkeypatch.setattr(llama, "add_vector", record)
    model(tokens_of(2, 9), steer={1: vector})
    assert calls == [(9, True)]
    calls.clear()
    generate(model, [[1, 5, 9, 8], [1, 7]], 3, -1, steer={1: vector})
    assert calls == [(4, True), (2, True), (1, True), (1, True)]  # two prompts, two new tokens


@pytest.mark.parametrize(
    ("v", "part"),
    [
        (torch.ones(31), "layer 1 is torch.float32 [31], but the model needs float numbers, 32"),
        (torch.ones(1), "layer 1 is torch.float32 [1], "),
        (torch.ones(()), "layer 1 is torch.float32 [], "),
        (torch.ones(32, dtype=torch.int64), "layer 1 is torch.int64 [32], "),
        (torch.ones(32, dtype=torch.bool), "layer 1 is torch.bool [32], "),
    ],
)
def test_vectors_that_cannot_be_added_are_named(mini, v, part):
    model, _ = mini
    refused(lambda: model(tokens_of(1, 5), steer={1: v}), part)
    refused(lambda: generate(model, [[3, 4]], 5, 2, {1: v}), part)


def test_there_must_be_prompts_with_tokens(mini):
    model, _ = mini
    for prompts in ([], [[3, 4], []]):
        refused(lambda prompts=prompts: generate(model, prompts, 5, 2), "there is no prompt, or")


@pytest.mark.parametrize("layer", [-1, 4])
def test_no_such_layer_to_steer(mini, vector, layer):
    model, _ = mini
    with pytest.raises(ValueError, match=rf"layer {layer}.*0\.\.3"):
        model(tokens_of(1, 3), steer={layer: vector})
    with pytest.raises(ValueError, match=rf"layer {layer}.*0\.\.3"):
        generate(model, [[1, 2]], 2, eos_id=2, steer={layer: vector})


# ---- cache and generation


def test_cached_equals_uncached(mini, vector):
    model, _ = mini
    tokens, steer = tokens_of(2, 20), {1: vector}
    whole = model(tokens, steer=steer)
    cache, parts = KVCache(model, 2, 20), []
    for start, stop in ((0, 7), (7, 8), (8, 15), (15, 20)):  # prefill, one token, several
        parts.append(model(tokens[:, start:stop], cache=cache, steer=steer))
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4
    assert cache.length == 20


def test_cache_goes_on_with_the_rows_it_takes(mini):
    model, _ = mini
    tokens, more = tokens_of(3, 12), tokens_of(4, 5)
    cache = KVCache(model, 3, 17)
    model(tokens, cache=cache)
    rows = torch.tensor([2, 0, 2, 1])
    cache.take(rows)
    expected = model(torch.cat((tokens[rows], more), 1))[:, 12:]
    assert (model(more, cache=cache) - expected).abs().max() <= 1e-4


def test_unequal_prompts_in_a_batch_equal_one_by_one(mini, vector):
    model, _ = mini
    prompts = [tokens_of(1, 30)[0, :n].tolist() for n in (3, 17, 30, 5)]
    vectors = torch.stack([vector, -vector, 0 * vector, 3 * vector])[:, None]  # (B, 1, dim)
    together = generate(model, prompts, 24, eos_id=-1, steer={1: vectors})
    alone = [
        generate(model, [prompt], 24, eos_id=-1, steer={1: v})[0]
        for prompt, v in zip(prompts, vectors, strict=True)
    ]
    assert together == alone
    assert len({tuple(row) for row in generate(model, prompts[:1] * 4, 24, -1, {1: vectors})}) > 1


def test_equal_prompts_keep_their_places_and_their_vectors(mini, vector):
    model, _ = mini
    prompts = [[1, 5, 9, 8], [1, 7], [1, 5, 9, 8], [1, 30, 31], [1, 7]]
    multipliers = torch.tensor([1.0, -1.0, -2.0, 0.5, 2.0])[:, None, None]
    together = generate(model, prompts, 16, -1, {1: multipliers * vector})
    for prompt, x, answer in zip(prompts, multipliers, together, strict=True):
        assert generate(model, [prompt], 16, -1, {1: x * vector}) == [answer]


def test_padding_is_never_seen(mini, vector, monkeypatch):
    model, _ = mini
    prompts = [tokens_of(1, 30)[0, :n].tolist() for n in (3, 17, 30)]
    expected = generate(model, prompts, 8, eos_id=-1, steer={1: vector})
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is now NaN
    try:
        assert generate(model, prompts, 8, eos_id=-1, steer={1: vector}) == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("steered", "runs_once"), [((1,), 2), ((3, 2), 3), ((), 4)])
def test_equal_prompts_run_once_up_to_the_first_steered_layer(mini, vector, steered, runs_once):
    model, _ = mini
    prompts = [[1, 5, 9, 8], [1, 7], [1, 5, 9, 8], [1, 5, 9, 8]]
    rows = []
    hooks = [
        block.register_forward_hook(lambda block, args, out: rows.append(len(out)))
        for block in model.layers
    ]
    generate(model, prompts, 1, eos_id=-1, steer={layer: vector for layer in steered})
    for hook in hooks:
        hook.remove()
    assert rows == [1] * runs_once + [3] * (4 - runs_once) + [1] * 4  # one prompt, the other


def test_each_row_stops_at_its_own_eos(mini):
    model, _ = mini
    prompts = [tokens_of(1, 40)[0, i : i + 4].tolist() for i in range(16)]
    free = generate(model, prompts, 40, eos_id=-1)
    eos = free[0][5]  # any token that some rows say early, some late, some never
    rows = generate(model, prompts, 40, eos_id=eos)
    assert rows == [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len({len(row) for row in rows}) > 2


def test_each_row_stops_at_the_first_of_several_ends(mini):
    model, _ = mini
    prompts = [[1, 5, 9, 8], [1, 7], [1, 30, 31]]
    free = generate(model, prompts, 20, eos_id=[])
    assert free == generate(model, prompts, 20, eos_id=-1)
    ends = {free[0][11], free[1][6]}  # each ends one of the first two rows
    for row, stopped in zip(free, generate(model, prompts, 20, eos_id=ends), strict=True):
        said = [token in ends for token in row]
        assert stopped == (row[: said.index(True) + 1] if any(said) else row)


def test_finished_rows_leave_the_batch_and_the_others_keep_their_vectors(mini, monkeypatch):
    model, _ = mini
    prompts = [tokens_of(1, 40)[0, i : i + 4 + i % 3].tolist() for i in range(16)]
    steer = {1: 0.05 * torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(2))}
    free = generate(model, prompts, 40, eos_id=-1, steer=steer)
    counts = [sum(token in row[:30] for row in free) for token in range(420)]
    eos = counts.index(max(counts))  # many rows say it, not all
    assert 6 <= max(counts) < 16
    sizes, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: sizes.append(len(tokens)) or embed(tokens))
    rows = generate(model, prompts, 40, eos_id=eos, steer=steer)
    assert sizes[:17] == [1] * 16 + [16] and sizes[-1] < 16  # the prompts, the steps
    assert rows == [row[: row.index(eos) + 1] if eos in row else row for row in free]


def test_sampling(mini):
    model, _ = mini
    prompts = [[1, 5, 9], [1, 7]]

    def draw(**how):
        return generate(model, prompts, 12, eos_id=-1, **how)

    assert draw(temperature=1.0, seed=3) == draw(temperature=1.0, seed=3)
    assert draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert draw(temperature=1.0, top_p=1e-6) == draw(temperature=1e-5) == draw()
    alone = generate(model, prompts[:1], 12, eos_id=-1, temperature=1.0, seed=3)
    assert draw(temperature=1.0, seed=3)[0] == alone[0]
    for how in (
        dict(temperature=float("nan")),
        dict(temperature=-1.0),
        dict(top_p=0.0),
        dict(top_p=1.5),
    ):
        with pytest.raises(ValueError, match="temperature .* top_p"):
            draw(**how)


def test_sample_follows_the_distribution_and_cuts_at_top_p():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4000, 4)
    u = (torch.arange(4000) + 0.5)[:, None] / 4000
    share = llama.sample(logits, 1.0, 1.0, u).bincount(minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.1, 0.5, 0.15, 0.25]), atol=1e-3)
    share = llama.sample(logits, 1.0, 0.74, u).bincount(minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=1e-3)
    hot = llama.sample(logits, 0.5, 1.0, u).bincount(minlength=4) / 4000  # p squared, normalised
    square = torch.tensor([0.1, 0.5, 0.15, 0.25]) ** 2
    assert torch.allclose(hot, square / square.sum(), atol=1e-3)


@pytest.fixture
def other_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_torchs_default_dtype_changes_nothing(mini, vector, other_default_dtype):
    model, _ = mini
    again = load(MINI)
    assert again.norm.weight.dtype == torch.float32
    drawn = [generate(x, [[3, 4, 5]], 20, -1, {1: vector}, temperature=1) for x in (model, again)]
    torch.set_default_dtype(torch.float32)
    expected = generate(model, [[3, 4, 5]], 20, -1, {1: vector}, temperature=1)
    assert drawn == [expected, expected]


def test_input_beyond_the_context_is_refused(mini):
    model, _ = mini
    with pytest.raises(ValueError, match="513 tokens exceed the model's context of 512"):
        model(torch.ones(1, 513, dtype=torch.long))
    with pytest.raises(ValueError, match="513 tokens exceed"):
        generate(model, [[1] * 500], 13, eos_id=2)


# ---- packing


def drawn(mask):
    """A row for each token, an x where it sees another."""
    return ["".join(".x"[int(seen)] for seen in row) for row in mask]


def test_two_pairs_behind_one_another():
    """The example in llama.py's comment on packing, and another pair."""
    batch = pack([PairIds([1, 2, 3], [4, 5], [6, 7, 8]), PairIds([9], [10], [11])])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1]]
    assert batch.predictors.tolist() == [2, 3, 2, 5, 6, 8, 8]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 10, 11]
    assert batch.lengths == [2, 3, 1, 1]
    first, second = batch.masks
    assert drawn(first) == [
        "x.......",  # the prompt
        "xx......",
        "xxx.....",
        "xxxx....",  # chosen: the prompt and itself
        "xxxxx...",
        "xxx..x..",  # rejected: the prompt and itself
        "xxx..xx.",
        "xxx..xxx",
    ]
    assert drawn(second) == ["x..", "xx.", "x.x"]


def test_a_prompt_may_have_any_number_of_responses():
    batch = pack([([1, 5], [6], [7, 8], [9]), ([1], [4, 2])])
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 2, 0, 1, 2]]
    assert batch.targets.tolist() == [6, 7, 8, 9, 4, 2]
    assert batch.predictors.tolist() == [1, 1, 3, 1, 6, 7]
    assert batch.lengths == [1, 2, 1, 2]
    first, second = batch.masks
    assert drawn(first) == ["x.....", "xx....", "xxx...", "xx.x..", "xx.xx.", "xx...x"]
    assert drawn(second) == ["x..", "xx.", "xxx"]


def test_packed_responses_have_the_logits_of_single_sequences(mini):
    model, _ = mini
    pairs = [PairIds([1, 5, 9], [7, 8], [30, 40, 50]), PairIds([1, 60], [70], [80, 90])]
    batch = pack(pairs)
    h = model.blocks(model.embed(batch.tokens), 0, 4, batch.positions, batch.masks)
    packed = model.head(h[0, batch.predictors]).split(batch.lengths)
    alone = [(prompt, response) for prompt, *both in pairs for response in both]
    for logits, (prompt, response) in zip(packed, alone, strict=True):
        expected = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        assert (logits - expected).abs().max() <= 1e-4
