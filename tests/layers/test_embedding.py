"""LoRAEmbedding: loralib's Embedding, corrected, with every option of nn.Embedding."""

import copy
import pickle

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRALayer
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.testing.tolerance import assert_close

NUM, DIM, R, ALPHA = 11, 6, 3, 5
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LIMITS = [{}, {"max_norm": 0.7}, {"max_norm": 1.3, "norm_type": 1.0}]


def make(device, r=R, dtype=None, lora_dtype=None, **options):
    """A layer whose lora_A is not zero, in training mode."""
    layer = LoRAEmbedding(NUM, DIM, r, ALPHA, device=device, dtype=dtype, **options)
    if r > 0:
        nn.init.normal_(layer.lora_A)
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = parameter.to(lora_dtype or parameter.dtype)
    return layer


def every_id(device, dtype=torch.int64):
    return torch.arange(NUM, device=device, dtype=dtype)


def formula(layer, x, dtype=None):
    """y in plain PyTorch, differentiable, in dtype or as the operands are."""
    w, a, b = (t if dtype is None else t.to(dtype) for t in (layer.weight, *adapter(layer)))
    rows = F.embedding(x, w.detach().clone(), None, layer.max_norm, layer.norm_type)
    h = F.embedding(x, a.T, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    return rows + (h @ b.T * layer.scaling).to(rows.dtype)


def adapter(layer):
    return layer.lora_A, layer.lora_B


def assert_same_up_to_rounding(actual, expected):
    """Two ways through the same float32-or-better arithmetic."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if actual.numel():
        bound = 8 * torch.finfo(actual.dtype).eps * expected.abs().max()
        assert (actual - expected).abs().max() <= bound


def loralib_pair(device, dtype=torch.float32, **options):
    """loralib's layer and ours with the same values."""
    theirs = loralib.Embedding(NUM, DIM, R, ALPHA, **options).to(device, dtype)
    nn.init.normal_(theirs.lora_A)
    ours = LoRAEmbedding(NUM, DIM, R, ALPHA, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# ---- loralib's surface ----


@pytest.mark.parametrize("r", [0, R])
def test_same_seed_draws_loralibs_values_under_loralibs_keys(r, seed):
    theirs = loralib.Embedding(NUM, DIM, r, ALPHA, padding_idx=2)
    torch.manual_seed(seed)
    ours = LoRAEmbedding(NUM, DIM, r, ALPHA, padding_idx=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}, {"merge_weights": False}]
)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_loralibs(training, options, seed, device):
    theirs, ours = loralib_pair(device, **options)
    exact = copy.deepcopy(theirs).double()
    x = torch.randint(NUM, (4, 7), device=device)
    dy = torch.randn(4, 7, DIM, device=device)
    layers = (ours, exact, theirs)
    outputs = []
    for layer in layers:
        layer.train(training)
        outputs.append(layer(x))
    assert_close(*outputs)
    if outputs[0].requires_grad:
        grads = [
            torch.autograd.grad(y, adapter(layer), dy.to(y.dtype))
            for y, layer in zip(outputs, layers, strict=True)
        ]
        for gradients in zip(*grads, strict=True):
            assert_close(*gradients)
    else:
        assert not training


def test_checkpoints_go_both_ways(seed, device):
    theirs, ours = loralib_pair(device)
    x = every_id(device)
    assert_close(ours(x), copy.deepcopy(theirs).double()(x), theirs(x))
    back = loralib.Embedding(NUM, DIM, R, ALPHA).to(device)
    back.load_state_dict(ours.state_dict())
    assert torch.equal(back(x), theirs(x))


def test_layer_is_an_embedding_and_a_lora_layer_with_loralibs_attributes():
    layer = LoRAEmbedding(NUM, DIM, R, ALPHA)
    assert isinstance(layer, nn.Embedding)
    assert isinstance(layer, LoRALayer)
    assert (layer.r, layer.lora_alpha, layer.scaling) == (R, ALPHA, ALPHA / R)
    assert (layer.merged, layer.merge_weights, layer.lora_dropout.p) == (False, True, 0.0)
    assert layer.lora_A.shape == (R, NUM)
    assert layer.lora_B.shape == (DIM, R)
    assert not layer.weight.requires_grad
    assert layer.extra_repr() == f"{NUM}, {DIM}, r={R}, lora_alpha={ALPHA}"


def test_rank_zero_is_a_plain_trainable_embedding(seed, device):
    layer = make(device, r=0, max_norm=0.5, padding_idx=1)
    plain = nn.Embedding(NUM, DIM, max_norm=0.5, padding_idx=1, device=device)
    plain.load_state_dict(layer.state_dict())
    assert not hasattr(layer, "lora_A")
    assert not hasattr(layer, "scaling")
    x = every_id(device)
    results = [module(x) for module in (layer, plain)]
    assert torch.equal(*results)
    grads = [
        torch.autograd.grad(y.sum(), module.weight)[0]
        for y, module in zip(results, (layer, plain), strict=True)
    ]
    assert torch.equal(*grads)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.eval().merged


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("r", {"r": -1}),
        ("r", {"r": 2.0}),
        ("r", {"r": True}),
        ("lora_alpha", {"r": 2, "lora_alpha": float("nan")}),
        ("lora_alpha", {"r": 2, "lora_alpha": None}),
    ],
)
def test_bad_arguments_are_named(argument, kwargs):
    with pytest.raises(ValueError, match=f"LoRAEmbedding: {argument} must be"):
        LoRAEmbedding(NUM, DIM, **kwargs)


# ---- values and gradients ----


@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_in_every_dtype(dtype, lora_dtype, seed, device):
    layer = make(device, dtype=dtype, lora_dtype=lora_dtype, padding_idx=3)
    x = torch.randint(NUM, (3, 5), device=device)
    dy = torch.randn(3, 5, DIM, device=device, dtype=dtype)
    y, exact, baseline = layer(x), formula(layer, x, torch.float64), formula(layer, x)
    assert_close(y, exact, baseline)
    grads = torch.autograd.grad(y, adapter(layer), dy)
    exact_grads = torch.autograd.grad(exact, adapter(layer), dy.double())
    baseline_grads = torch.autograd.grad(baseline, adapter(layer), dy)
    for parameter, grad, truth, other in zip(
        adapter(layer), grads, exact_grads, baseline_grads, strict=True
    ):
        assert grad.dtype == parameter.dtype
        assert_close(grad, truth.double(), other)


def test_low_rank_product_over_a_16_bit_base_runs_in_float32(seed, device):
    layer = make(device, dtype=torch.bfloat16, lora_dtype=torch.float32)
    x = every_id(device)
    exact = formula(layer, x, torch.float64)
    half_an_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert ((layer(x).double() - exact).abs() <= exact.abs() * half_an_ulp + 1e-5).all()


def test_gradcheck(seed, device):
    layer = make(device, dtype=torch.float64, max_norm=0.9)
    x = torch.tensor([[1, 4, 4], [0, 7, 1]], device=device)

    def run(a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(run, adapter(layer))
    assert torch.autograd.gradgradcheck(run, adapter(layer))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 3), (2, 1, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_ids_of_any_shape(training, dtype, shape, seed, device):
    layer = make(device, max_norm=0.8).train(training)
    x = torch.randint(NUM, shape, device=device, dtype=dtype)
    y = layer(x)
    assert y.shape == (*shape, DIM)
    rows = layer(every_id(device))
    assert_same_up_to_rounding(y, rows[x.long()])


def test_ids_may_be_a_view(seed, device):
    layer = make(device)
    x = torch.randint(NUM, (6, 4), device=device)
    assert torch.equal(layer(x.T), layer(x).transpose(0, 1))
    assert torch.equal(layer(x[:1].expand(3, 4)), layer(x[[0, 0, 0]]))


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (None, "NoneType"),
        ([1, 2], "list"),
        (torch.ones(3), "torch.float32"),
        (torch.ones(3, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(3, dtype=torch.bool), "torch.bool"),
        (torch.ones(3, dtype=torch.int64).to_sparse(), "torch.sparse_coo"),
    ],
    ids=["None", "list", "float", "complex", "bool", "sparse"],
)
@pytest.mark.parametrize("r", [0, R])
@pytest.mark.parametrize("training", [True, False])
def test_bad_ids_are_a_type_error_that_names_x_and_the_layer(training, r, x, got, device):
    layer = make(device, r=r).train(training)
    with pytest.raises(TypeError, match=rf"LoRAEmbedding\({NUM}, {DIM}, .*: x must .*{got}"):
        layer(x)


def test_ids_on_another_device_are_a_value_error(device):
    with pytest.raises(ValueError, match=r"LoRAEmbedding\(.*: x must be on weight's device"):
        make(device)(torch.zeros(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("index", [NUM, -1])
@pytest.mark.parametrize("sparse", [False, True])
def test_ids_out_of_range_are_pytorchs_index_error(sparse, index):
    layer = make("cpu", sparse=sparse)  # on a GPU the failed assertion would end the process
    with pytest.raises(IndexError):
        layer(torch.tensor([index]))


def test_nan_in_one_row_stays_there(seed, device):
    layer = make(device, max_norm=0.9)
    clean = layer(every_id(device))
    with torch.no_grad():
        layer.weight[2], layer.lora_A[:, 5] = torch.nan, torch.inf
    y = layer(every_id(device))
    others = [i for i in range(NUM) if i not in (2, 5)]
    assert torch.equal(y[others], clean[others])
    assert not y[[2, 5]].isfinite().any()


# ---- merging ----


@pytest.mark.parametrize("options", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_output_is_the_unmerged_one_for_every_id(dtype, options, seed, device):
    layer = make(device, dtype=dtype, **options)
    base = layer.weight.clone()
    x = every_id(device)
    unmerged = layer(x)
    merged = layer.eval()(x)
    assert layer.merged
    assert not torch.equal(layer.complete_weight(), base)
    assert torch.equal(layer.weight, base)
    assert_same_up_to_rounding(merged, unmerged)
    assert torch.equal(layer(x), merged)
    assert_close(merged, formula(layer.train(), x, torch.float64), unmerged)
    assert torch.equal(layer.weight, base)


def test_train_restores_a_bf16_base_bit_for_bit_after_a_thousand_cycles(seed, device):
    layer = make(device, dtype=torch.bfloat16, max_norm=0.9)
    base, merged = layer.weight.clone(), layer.eval().complete_weight()
    x = every_id(device)
    for _ in range(1000):
        layer.train()
        assert torch.equal(layer.weight, base)
        layer.eval()
    layer(x)
    assert torch.equal(layer.complete_weight(), merged)
    assert torch.equal(layer.train().weight, base)


def test_train_and_eval_return_the_layer(device):
    layer = make(device)
    assert layer.eval() is layer
    assert layer.train() is layer


def test_state_dict_saved_while_merged_holds_the_base(seed, device):
    layer = make(device)
    base = layer.weight.clone()
    y = layer(every_id(device))
    saved = layer.eval().state_dict()
    assert torch.equal(saved["weight"].to(device), base)
    restored = LoRAEmbedding(NUM, DIM, R, ALPHA, device=device).eval()
    restored.load_state_dict(saved)
    assert_same_up_to_rounding(restored(every_id(device)), y)
    assert torch.equal(restored.train().weight, base)


def test_edits_while_merged_take_effect_and_keep_the_base(seed, device):
    layer = make(device, max_norm=0.9)
    base = layer.weight.clone()
    layer.eval()
    with torch.no_grad():
        layer.lora_A.mul_(-2)
    merged = layer(every_id(device))
    assert torch.equal(layer.train().weight, base)
    assert_same_up_to_rounding(layer(every_id(device)), merged)


def test_eval_under_autocast_merges_a_full_precision_delta(seed, device):
    layer = make(device, max_norm=0.9)
    expected = layer.merged_weight()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        layer.eval()
        assert torch.equal(layer.merged_weight(), expected)
    assert torch.equal(layer.complete_weight(), expected)


def test_autocast_leaves_the_output_as_it_is(seed, device):
    layer = make(device)
    x = every_id(device)
    y = layer(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("options", LIMITS)
def test_tied_head_is_left_alone_and_both_are_right(options, seed, device):
    model = nn.ModuleDict({"embed": make(device, **options), "head": nn.Linear(DIM, NUM, False)})
    model["head"].weight = model["embed"].weight
    base = model["embed"].weight.clone()
    x, hidden = every_id(device), torch.randn(2, DIM, device=device)
    y, logits = model["embed"](x), model["head"](hidden)
    model.eval()
    assert model["embed"].merged
    assert torch.equal(model["head"].weight, base)
    assert_same_up_to_rounding(model["embed"](x), y)
    assert torch.equal(model["head"](hidden), logits)
    assert torch.equal(model["embed"].weight, base)


def test_merge_weights_false_trains_in_eval(seed, device):
    layer = make(device, merge_weights=False).eval()
    assert not layer.merged
    layer(every_id(device)).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0


# ---- nn.Embedding's options ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
def test_max_norm_limits_the_base_rows_and_nothing_else(norm_type, training, seed, device):
    layer = make(device, max_norm=0.7, norm_type=norm_type, merge_weights=False).train(training)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    y = layer(every_id(device))
    assert_close(
        y, formula(layer, every_id(device), torch.float64), formula(layer, every_id(device))
    )
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), f"the forward wrote to {key}"
    plain = nn.Embedding(
        NUM, DIM, max_norm=0.7, norm_type=norm_type, _weight=before["weight"].clone()
    )
    with torch.no_grad():
        layer.lora_A.zero_()
    assert_same_up_to_rounding(layer(every_id(device)), plain(every_id(device)))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_sparse_gives_the_dense_gradients(padding_idx, seed, device):
    dense = make(device, padding_idx=padding_idx)
    sparse = make(device, padding_idx=padding_idx, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    x = torch.tensor([[3, 1, 3], [8, 8, 0]], device=device)
    dy = torch.randn(2, 3, DIM, device=device)
    dense(x).backward(dy)
    sparse(x).backward(dy)
    assert torch.equal(sparse(x), dense(x))
    assert sparse.lora_A.grad.is_sparse
    assert sparse.lora_A.grad.shape == (R, NUM)
    assert_same_up_to_rounding(sparse.lora_A.grad.to_dense(), dense.lora_A.grad)
    assert torch.equal(sparse.lora_B.grad, dense.lora_B.grad)
    sparse(x).backward(dy)
    assert_same_up_to_rounding(sparse.lora_A.grad.to_dense(), 2 * dense.lora_A.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_trains(optimizer, seed, device):
    layer = make(device, sparse=True)
    x = torch.tensor([1, 4, 4], device=device)
    before = layer.lora_A.detach().clone()
    optimizer_a = optimizer([layer.lora_A], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer_a.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        optimizer_a.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    moved = (layer.lora_A != before).any(0).nonzero().flatten().tolist()
    assert moved == [1, 4]


@pytest.mark.parametrize("sparse", [False, True])
def test_padding_row_gets_no_gradient(sparse, seed, device):
    layer = make(device, padding_idx=3, sparse=sparse)
    layer.weight.requires_grad = True
    layer(torch.tensor([3, 3, 5], device=device)).sum().backward()
    grad_a, grad_w = (p.grad.to_dense() if sparse else p.grad for p in (layer.lora_A, layer.weight))
    assert torch.equal(grad_a[:, 3], torch.zeros(R, device=device))
    assert torch.equal(grad_w[3], torch.zeros(DIM, device=device))
    assert grad_a[:, 5].abs().min() > 0
    assert torch.equal(grad_w[5], torch.ones(DIM, device=device))


def test_padding_alone_in_a_sparse_batch(seed, device):
    layer = make(device, padding_idx=3, sparse=True)
    layer(torch.tensor([3, 3], device=device)).sum().backward()
    assert layer.lora_A.grad.to_dense().abs().sum() == 0


# ---- wrapping ----


def test_from_embedding_takes_the_parameter_the_options_and_the_mode(seed, device):
    options = {
        "padding_idx": 2, "max_norm": 0.8, "norm_type": 1.0, "scale_grad_by_freq": True,
    }  # fmt: skip
    plain = nn.Embedding(NUM, DIM, device=device, dtype=torch.bfloat16, **options).eval()
    weight = plain.weight
    layer = LoRAEmbedding.from_embedding(plain, R, ALPHA, lora_dtype=torch.float32)
    assert layer.weight is weight
    assert {name: getattr(layer, name) for name in options} == options
    assert not layer.training
    assert (layer.lora_A.dtype, layer.lora_A.device.type) == (torch.float32, device.type)
    assert not layer.weight.requires_grad
    assert not layer.lora_A.any()
    x = every_id(device)
    exact = copy.deepcopy(plain).double()(x)
    assert_close(layer(x), exact, plain(x))


def test_from_embedding_keeps_sparse():
    assert LoRAEmbedding.from_embedding(nn.Embedding(NUM, DIM, sparse=True), R).sparse


def test_from_embedding_refuses_what_it_would_compute_differently():
    class Scaled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 8

    refused = [
        None,
        nn.Linear(2, 2),
        Scaled(2, 2),
        LoRAEmbedding(2, 2, 1),
        nn.utils.parametrizations.weight_norm(nn.Embedding(2, 2)),
    ]
    for module in refused:
        with pytest.raises(TypeError, match=r"LoRAEmbedding: embedding must be a plain nn\."):
            LoRAEmbedding.from_embedding(module, R)


def test_from_pretrained_keeps_the_given_weight(seed):
    weight = torch.randn(NUM, DIM)
    layer = LoRAEmbedding.from_pretrained(weight.clone())
    assert torch.equal(layer.weight, weight)
    assert torch.equal(LoRAEmbedding(NUM, DIM, R, _weight=weight.clone()).weight, weight)


# ---- PyTorch around it ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(clone, training, seed, device):
    layer = make(device, max_norm=0.9).train(training)
    x = every_id(device)
    twin = clone(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.merged == layer.merged
    assert torch.equal(twin.train().weight, layer.train().weight)


def test_cast_while_merged_casts_the_base(seed, device):
    layer = make(device)
    base = layer.weight.clone()
    layer.eval().to(torch.bfloat16)
    assert layer.merged
    assert torch.equal(layer.complete_weight(), layer.merged_weight())
    assert torch.equal(layer.train().weight, base.to(torch.bfloat16))


def test_meta_then_to_empty_then_reset(seed, device):
    layer = LoRAEmbedding(NUM, DIM, R, ALPHA, padding_idx=2, device="meta")
    assert layer(every_id("meta")).shape == (NUM, DIM)
    assert layer(every_id("meta")).is_meta
    layer.to_empty(device=device).reset_parameters()
    x = every_id(device)
    assert torch.equal(layer(x), layer.weight)
    assert not layer.weight[2].any()
    assert layer.lora_B.std() > 0


@pytest.mark.parametrize("options", LIMITS)
def test_compiles_into_one_graph(options, seed, device):
    layer = make(device, **options)
    x = torch.randint(NUM, (3, 4), device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = layer(x)
    expected = torch.autograd.grad(y.sum(), adapter(layer))
    z = compiled(x)
    assert_same_up_to_rounding(z, y)
    for grad, truth in zip(torch.autograd.grad(z.sum(), adapter(layer)), expected, strict=True):
        assert_same_up_to_rounding(grad, truth)
