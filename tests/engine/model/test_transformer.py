"""The decoder: first loss, causality, and every option of its config alive and differentiable."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from engine.config import ModelConfig
from engine.model.cache import KVCache
from engine.model.transformer import Block, Transformer, initialise, relu2
from tests.conftest import make_model

OPTIONS = {
    "default": {},
    "layernorm": {"norm": "layernorm"},
    "large norm_eps": {"norm_eps": 0.1},
    "sandwich_norm": {"norm_placement": "sandwich"},
    "sandwich layernorm": {"norm_placement": "sandwich", "norm": "layernorm"},
    "no qk_norm": {"qk_norm": "none"},
    "learned": {"position": "learned"},
    "none": {"position": "none"},
    "rope_theta": {"rope_theta": 100.0},
    "geglu": {"activation": "geglu"},
    "gelu": {"activation": "gelu"},
    "relu2": {"activation": "relu2"},
    "attention_bias": {"attention_bias": True},
    "output_bias": {"output_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "ungated mlp_bias": {"mlp_bias": True, "activation": "gelu"},
    "tied": {"tie_embeddings": True},
    "softcap": {"logit_softcap": 2.0},
    "window": {"sliding_window": 4},
    "mixed": {"sliding_window": 4, "full_every": 2},
    "grouped": {"n_kv_heads": 2},
    "one key/value head": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 20},
    "odd heads": {"head_dim": 5, "position": "none"},
    "d_ff": {"d_ff": 48},
    "n_layers": {"n_layers": 3},
    "everything": {
        "norm": "layernorm",
        "norm_placement": "sandwich",
        "activation": "geglu",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
        "logit_softcap": 5.0,
        "sliding_window": 6,
        "full_every": 3,
        "n_kv_heads": 2,
        "head_dim": 10,
        "n_layers": 3,
    },
}
every_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)


def draw(*shape: int, seed: int = 0, vocab: int = 400) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def fresh(seed: int = 0, **changes) -> Transformer:
    model = Transformer(ModelConfig(**({"vocab_size": 400} | changes)))
    initialise(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("vocab_size", [400, 4096])
@pytest.mark.parametrize(
    "changes", [{}, {"norm": "layernorm"}, {"norm_placement": "sandwich"}], ids=str
)
def test_first_loss_is_ln_v(vocab_size, changes):
    """An untied head starts at zero, so every token is exactly as likely as any other."""
    model = fresh(vocab_size=vocab_size, **changes)
    loss = loss_of(model, draw(2, 65, vocab=vocab_size))
    assert abs(loss.item() - math.log(vocab_size)) < 1e-5


@pytest.mark.parametrize("d_model, vocab_size", [(64, 400), (128, 4096), (256, 4096)])
def test_first_loss_of_a_tied_head_is_near_ln_v(d_model, vocab_size):
    """A tied head scores the token it reads at 0.02·D: a known, small excess over ln V."""
    model = fresh(vocab_size=vocab_size, d_model=d_model, tie_embeddings=True)
    loss = loss_of(model, draw(2, 257, vocab=vocab_size)).item()
    own, noise = math.exp(0.02 * d_model), vocab_size * math.exp(2e-4 * d_model)
    assert abs(loss - math.log(own + noise)) < 0.05
    assert loss - math.log(vocab_size) < 0.15


def test_initialise_starts_every_block_as_the_identity():
    model, tokens = fresh(n_layers=3), draw(2, 9)
    with torch.no_grad():
        hidden = model.hidden(tokens)
        torch.testing.assert_close(hidden, model.norm(model.embed_tokens(tokens)))


def test_initialise_gives_reading_matrices_variance_one_over_fan_in():
    model = fresh(d_model=256, n_layers=1)
    for name in ("attention.q_proj", "attention.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        weight = model.blocks[0].get_submodule(name).weight
        assert abs(weight.std().item() * 256**0.5 - 1) < 0.02, name
        assert abs(weight.mean().item()) < 1e-3, name


def test_initialise_depends_on_its_generator_alone():
    """Same seed, same weights, whatever the global generator does; another seed, other weights."""
    torch.manual_seed(1)
    first = fresh(seed=5, tie_embeddings=True).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = Transformer(ModelConfig(vocab_size=400, tie_embeddings=True))
    between = torch.get_rng_state()
    initialise(model, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), between)
    assert not torch.equal(state, between)
    assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())
    other = fresh(seed=6, tie_embeddings=True).state_dict()
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_initialise_forgets_what_was_there():
    """All weights are filled, norms too, so a used model becomes a new one."""
    used = make_model(norm="layernorm", attention_bias=True, position="learned")
    new = Transformer(used.config)
    for model in (used, new):
        initialise(model, torch.Generator().manual_seed(0))
    for name, tensor in new.state_dict().items():
        assert torch.equal(used.state_dict()[name], tensor), name


@every_option
def test_every_option_trains_every_parameter(changes):
    """One step back from the loss reaches each tensor: nothing is built and left unused."""
    model = make_model(**changes)
    loss = loss_of(model, draw(3, 24))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if name not in ("default", "odd heads", "everything")]
)
def test_no_option_is_ignored(name):
    """Each option alone changes the parameters, or else the logits of the same parameters."""
    base, changed = make_model(), make_model(**OPTIONS[name])
    assert dataclasses.asdict(base.config) != dataclasses.asdict(changed.config)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (base, changed)]
    if shapes[0] == shapes[1]:
        changed.load_state_dict(base.state_dict())
        with torch.no_grad():
            difference = (base(draw(2, 24)) - changed(draw(2, 24))).abs().max()
        assert difference > 1e-4


@every_option
def test_a_later_token_never_changes_earlier_logits(changes):
    model, tokens = make_model(**changes), draw(2, 20)
    with torch.no_grad():
        before = model(tokens)
        for position in (1, 7, 19):
            other = tokens.clone()
            other[:, position] = (other[:, position] + 1) % 400
            after = model(other)
            same = slice(0, position)
            torch.testing.assert_close(after[:, same], before[:, same], atol=1e-6, rtol=0)
            assert (after[:, position] - before[:, position]).abs().max() > 1e-3


def test_not_causal_sees_the_future():
    model, tokens = make_model(), draw(1, 12)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 400
    with torch.no_grad():
        change = model(tokens, causal=False) - model(other, causal=False)
    assert (change.abs().amax(-1) > 1e-5).all()


def test_without_causality_and_positions_order_means_nothing():
    """Shuffling the tokens shuffles the logits: attention alone knows no order."""
    model, tokens = make_model(position="none"), draw(1, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shuffled = model(tokens[:, order], causal=False)
        torch.testing.assert_close(shuffled, model(tokens, causal=False)[:, order])
        assert (model(tokens[:, order]) - model(tokens)[:, order]).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_positions_tell_order(position):
    """The same token at two places behind the same context gets different logits."""
    model = make_model(position=position)
    with torch.no_grad():
        a = model(torch.tensor([[5, 6, 7]]))[0, -1]
        b = model(torch.tensor([[6, 5, 7]]))[0, -1]
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("window, n_layers", [(1, 2), (3, 1), (3, 2), (4, 3)])
def test_a_window_reaches_exactly_as_far_as_its_layers_stack(window, n_layers):
    """L layers of window w see L·(w-1) tokens back and not one more."""
    model, tokens = make_model(sliding_window=window, n_layers=n_layers), draw(1, 20)
    reach = n_layers * (window - 1)
    with torch.no_grad():
        before = model(tokens)[0, -1]
        for back in range(20):
            other = tokens.clone()
            other[0, 19 - back] = (other[0, 19 - back] + 1) % 400
            change = (model(other)[0, -1] - before).abs().max()
            assert (change > 1e-6) == (back <= reach), back


def test_full_layers_among_windows():
    """Every third layer sees all; the others see the window."""
    config = ModelConfig(vocab_size=9, n_layers=7, sliding_window=16, full_every=3)
    assert [config.window(layer) for layer in range(7)] == [16, 16, 0, 16, 16, 0, 16]
    mixed = make_model(sliding_window=2, full_every=2)
    tokens, other = draw(1, 20), draw(1, 20)
    other[0, 0] += 1
    with torch.no_grad():
        assert (mixed(tokens)[0, -1] - mixed(other)[0, -1]).abs().max() > 1e-6


@every_option
def test_embeddings_in_place_of_tokens(changes):
    model, tokens = make_model(**changes), draw(2, 12)
    with torch.no_grad():
        embeds = model.embed_tokens(tokens)
        expected = model.hidden(tokens)
        assert torch.equal(model.hidden(None, inputs_embeds=embeds), expected)
        cache = KVCache(model.config, rows=2)
        model.hidden(tokens[:, :5], cache)
        rest = model.hidden(None, cache, inputs_embeds=embeds[:, 5:])
        torch.testing.assert_close(rest, expected[:, 5:], atol=1e-5, rtol=1e-5)


def test_softcap_bounds_the_logits_by_its_formula():
    plain, capped = make_model(), make_model(logit_softcap=3.0)
    with torch.no_grad():
        for model in (plain, capped):
            model.lm_head.weight.mul_(5)
        logits, squashed = plain(draw(2, 20)), capped(draw(2, 20))
    assert logits.abs().max() > 6
    assert squashed.abs().max() <= 3
    torch.testing.assert_close(squashed, 3 * torch.tanh(logits / 3))


@every_option
def test_rows_of_a_batch_are_alone(changes):
    model, tokens = make_model(**changes), draw(3, 16)
    with torch.no_grad():
        together = model(tokens)
        for row in range(3):
            alone = model(tokens[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


ENDS = (5, 1, 9, 3)  # texts in one row
MORE = {
    "attention softcap": {"attention_softcap": 3.0},
    "base of its own": {"sliding_window": 4, "full_every": 2, "local_rope_theta": 50.0},
}


@pytest.mark.parametrize("changes", [*OPTIONS.values(), *MORE.values()], ids=[*OPTIONS, *MORE])
def test_texts_in_one_row_are_alone(changes):
    """No leak through packing: what stands third has the logits that it has by itself."""
    model, tokens = make_model(**changes), draw(1, sum(ENDS))
    with torch.no_grad():
        packed = model.head(model.hidden(tokens, lengths=ENDS))
        joined = model(tokens)
        alone = torch.cat([model(text) for text in tokens.split(ENDS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert (joined - alone).abs().max() > 1e-3  # the control: without lengths they do see


def test_a_packed_text_has_the_gradient_it_has_alone():
    tokens = draw(1, sum(ENDS))
    found = []
    for packed in (True, False):
        model = make_model(sliding_window=4, full_every=2)
        if packed:
            model.hidden(tokens, lengths=ENDS).square().sum().backward()
        else:
            for text in tokens.split(ENDS, dim=1):
                model.hidden(text).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(), ENDS])
def test_recomputing_blocks_gives_the_same_gradient_to_the_bit(lengths):
    found = []
    for recompute in (False, True):
        model = make_model().train()
        for block in model.blocks:
            block.drop.p = 0.2  # type: ignore[union-attr, assignment]
        torch.manual_seed(5)
        x = model.hidden(draw(1, sum(ENDS)), lengths=lengths, recompute=recompute)
        x.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu2"])
@pytest.mark.parametrize("norm_placement", ["pre", "post", "sandwich"])
def test_gradient_of_a_block(activation, norm_placement):
    """Finite differences in fp64 for the input and every weight; LayerNorm stays in fp64."""
    config = ModelConfig(
        vocab_size=4,
        d_model=4,
        n_heads=2,
        n_kv_heads=1,
        d_ff=3,
        norm="layernorm",
        norm_eps=0.1,
        position="none",
        activation=activation,
        norm_placement=norm_placement,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    random = torch.Generator().manual_seed(0)
    block = Block(config, dropout=0.0).double()
    names = [name for name, _ in block.named_parameters()]
    weights = [
        torch.randn(p.shape, generator=random, dtype=torch.float64).requires_grad_()
        for p in block.parameters()
    ]
    x = torch.randn(1, 3, 4, generator=random, dtype=torch.float64).requires_grad_()
    look = {"rope": None, "mask_TS": None, "causal": True, "cache": None, "length": 0}

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,), look)

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


def test_gradient_of_the_default_model():
    """Along a random direction, the fp32 slope of the loss is the finite difference."""
    model, tokens = make_model(n_kv_heads=2), draw(2, 24)
    loss_of(model, tokens).backward()
    random = torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, generator=random) for p in model.parameters()]
    slope = sum((p.grad * d).sum().item() for p, d in zip(model.parameters(), way, strict=True))
    losses, step = [], 1e-3
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(model.parameters(), way, strict=True):
                p.add_(d, alpha=sign * step)
            losses.append(loss_of(model, tokens).item())
    assert abs(slope) > 0.1
    assert abs((losses[0] - losses[1]) / (2 * step) - slope) < 0.02 * abs(slope)


def test_relu2_by_hand():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert relu2(x).tolist() == [0.0, 0.0, 0.25, 9.0]


def test_dropout_works_in_training_only():
    config = ModelConfig(vocab_size=400, d_model=32, n_layers=2)
    model, plain = Transformer(config, dropout=0.5), Transformer(config)
    plain.load_state_dict(model.state_dict())
    tokens = draw(2, 9)
    with torch.no_grad():
        assert not torch.equal(model.train()(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), plain.eval()(tokens))


def test_tied_head_is_the_embedding():
    model = make_model(tie_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert make_model().lm_head.weight is not make_model().embed_tokens.weight


def test_rotations_follow_from_the_config_and_are_not_stored():
    """A model made without memory, as loading does, turns positions as any other."""
    model = make_model()
    with torch.device("meta"):
        empty = Transformer(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty(draw(1, 50)), model(draw(1, 50)))


def test_the_whole_context_and_no_more():
    """A model runs at exactly max_seq_len tokens; positions it has no row for are an error."""
    for position in ("rope", "learned", "none"):
        model = make_model(position=position, max_seq_len=16)
        with torch.no_grad():
            assert model(draw(1, 16)).shape == (1, 16, 400)
            with pytest.raises(ValueError, match="max_seq_len=16"):
                model(draw(1, 17))


def test_equals_gpt2():
    """LayerNorm, learned positions, GELU and biases everywhere, against transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100,
            n_positions=32,
            n_embd=24,
            n_layer=2,
            n_head=3,
            activation_function="gelu",
            initializer_range=0.2,
        )
    ).eval()
    ours = make_model(
        vocab_size=100,
        d_model=24,
        n_heads=3,
        d_ff=96,
        max_seq_len=32,
        norm="layernorm",
        norm_eps=1e-5,
        qk_norm="none",
        position="learned",
        activation="gelu",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    )
    for parameter in theirs.parameters():  # so that zero biases and unit norms hide nothing
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    source = theirs.transformer
    state = {
        "embed_tokens.weight": source.wte.weight,
        "lm_head.weight": source.wte.weight,
        "embed_positions.weight": source.wpe.weight,
        "norm.weight": source.ln_f.weight,
        "norm.bias": source.ln_f.bias,
    }
    for i, layer in enumerate(source.h):
        names = {
            "input_norm": layer.ln_1,
            "mlp_norm": layer.ln_2,
            "attention.o_proj": layer.attn.c_proj,
            "mlp.up_proj": layer.mlp.c_fc,
            "mlp.down_proj": layer.mlp.c_proj,
        }
        for name, module in names.items():
            state[f"blocks.{i}.{name}.weight"] = (
                module.weight.T if "proj" in name else module.weight
            )
            state[f"blocks.{i}.{name}.bias"] = module.bias
        weights, biases = (
            t.chunk(3, -1) for t in (layer.attn.c_attn.weight, layer.attn.c_attn.bias)
        )
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"blocks.{i}.attention.{part}_proj.weight"] = weight.T
            state[f"blocks.{i}.attention.{part}_proj.bias"] = bias
    ours.load_state_dict(state)
    tokens = draw(2, 32, vocab=100)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
