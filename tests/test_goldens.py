"""The golden files, and files of their form that NumPy computes here from the formulas: other shapes, other names."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.goldens import TOLERANCE, run_golden

FILES = sorted((Path(__file__).parent / "fixtures" / "goldens").glob("*.npz"))
# Parts of a file that go into the module; the rest comes out of it.
GIVEN = ("meta", "cotangent", "x", "y", "o_prev", "prev", "lam", "w1", "w2", "wq", "wk", "wv")
GIVEN_ENDINGS = ("_weight", "_bias", "_gamma", "_beta", "_running_mean", "_running_var")


def test_there_is_a_file_of_every_module():
    modules = {"afi", "afi_basic_block", "aff", "iaff", "ms_cam", "mrla_base", "mrla_light"}
    assert {path.stem for path in FILES} == modules


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_modules_compute_all_that_the_file_holds(path, dtype):
    with np.load(path) as file:
        expected = {name: file[name] for name in file.files if name not in GIVEN and not name.endswith(GIVEN_ENDINGS)}
    ours = run_golden(path, dtype)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, **TOLERANCE, err_msg=name)


def test_a_value_that_nothing_computes_is_an_error_not_left_out(tmp_path):
    with np.load(FILES[0]) as file:
        np.savez(tmp_path / "more.npz", **file, grad_nobody=np.zeros(1))
    with pytest.raises(ValueError, match="nothing here computes grad_nobody"):
        run_golden(tmp_path / "more.npz")


def test_a_file_of_another_module_is_refused_by_what_it_says(tmp_path):
    np.savez(tmp_path / "se.npz", meta=json.dumps({"module": "Squeeze"}), x=np.zeros(1))
    with pytest.raises(ValueError, match=r"\(Squeeze\).* has x"):
        run_golden(tmp_path / "se.npz")


# The formulas once more, in NumPy. v: inputs and parameters by the files' names.


def relu(a):
    return np.maximum(a, 0)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def softmax(a, axis):
    a = np.exp(a)
    return a / a.sum(axis=axis, keepdims=True)


def gap(a):
    return a.mean(axis=(-2, -1))


def spatial(a):
    return a[..., None, None]


def patches(a, size):
    """The map as each place of a kernel sees it, zeros around: (size, size, ...)."""
    around = np.pad(a, [(0, 0)] * (a.ndim - 2) + [(size // 2, size // 2)] * 2)
    height, width = a.shape[-2:]
    return np.array([[around[..., i : i + height, j : j + width] for j in range(size)] for i in range(size)])


def convolve(a, kernel):
    return np.einsum("ocij,ijbchw->bohw", kernel, patches(a, kernel.shape[-1]))


def normalize(v, name, a, after):
    """With running statistics; with the batch's where `after` is a dict, which takes the next running statistics."""
    mean, var = v[f"{name}_running_mean"], v[f"{name}_running_var"]
    if after is not None:
        batch_mean, batch_var, count = a.mean(axis=(0, 2, 3)), a.var(axis=(0, 2, 3)), a[:, 0].size
        after[f"{name}_running_mean_after_train_step"] = 0.9 * mean + 0.1 * batch_mean
        after[f"{name}_running_var_after_train_step"] = 0.9 * var + 0.1 * batch_var * count / (count - 1)
        mean, var = batch_mean, batch_var
    return spatial(v[f"{name}_gamma"] / np.sqrt(var + 1e-5)) * (a - spatial(mean)) + spatial(v[f"{name}_beta"])


def context(v, branch, u, after):
    for part, norm in (("reduce", "bn1"), ("expand", "bn2")):
        u = relu(u) if part == "expand" else u
        u = convolve(u, spatial(v[f"{branch}_{part}_weight"])) + spatial(v[f"{branch}_{part}_bias"])
        u = normalize(v, f"{branch}_{norm}", u, after)
    return u


def attention(v, u, after, local="local", everywhere="global"):
    return sigmoid(context(v, local, u, after) + context(v, everywhere, spatial(gap(u)), after))


def ms_cam(v, after):
    return v["x"] * attention(v, v["x"], after)


def aff(v, after):
    w = attention(v, v["x"] + v["y"], after)
    return 2 * v["x"] * w + 2 * v["y"] * (1 - w)


def iaff(v, after, second_global="global2"):
    w = attention(v, v["x"] + v["y"], after)
    w = attention(v, v["x"] * w + v["y"] * (1 - w), after, "local2", second_global)
    return v["x"] * w + v["y"] * (1 - w)


def in_both_modes(formula, v):
    after = {}
    outputs = {"out_eval": formula(v, None)}
    if len(v["x"]) > 1:
        outputs["out_train"] = formula(v, after)
    if formula is iaff:
        outputs["out_eval_first_global_reused"] = iaff(v, None, "global")
    return outputs | after


def integrate(w1, w2, features):
    means = gap(features)
    scores = relu(means @ w1.T) @ w2.T
    weights = softmax(scores, axis=0)
    return {"z": means, "scores": scores, "weights": weights, "out": (spatial(weights) * features).sum(axis=0)}


def afi(v):
    return integrate(v["w1"], v["w2"], v["x"]) | {"out_first_only": v["x"][0]}


def afi_basic_block(v):
    outputs = {"fused": integrate(v["w1"], v["w2"], v["prev"])["out"]}
    for mode, after in (("eval", None), ("train", {})):
        own = relu(normalize(v, "bn1", convolve(v["x"], v["conv1_weight"]), after))
        both = np.concatenate([own, outputs["fused"]], axis=1)
        outputs[f"out_{mode}"] = relu(normalize(v, "bn2", convolve(both, v["conv2_weight"]), after) + v["x"])
        outputs |= {"feature_eval": own} if mode == "eval" else {}
    return outputs


def query_key_value(x, wq, wk, wv):
    around = np.pad(gap(x), [(0, 0), (len(wq) // 2, len(wq) // 2)])
    query, key = (np.stack([np.correlate(row, kernel, "valid") for row in around]) for kernel in (wq, wk))
    return query, key, np.einsum("cij,ijbchw->bchw", wv, patches(x, 3))


def per_head(a, heads):
    return a.reshape(*a.shape[:-1], heads, -1)


def mrla_light(heads, v):
    query, key, value = query_key_value(v["x"], v["wq"], v["wk"], v["wv"])
    products = per_head(query * key, heads).sum(axis=-1) / np.sqrt(query.shape[1] / heads)
    drawn = spatial(sigmoid(products).repeat(query.shape[1] // heads, axis=1)) * value
    fused = drawn + spatial(v["lam"]) * v["o_prev"]
    block_eval, block_train = (v["x"] + normalize(v, "bn", fused, after) for after in (None, {}))
    return {"out_layer": drawn, "out_module": fused, "out_block_eval": block_eval, "out_block_train": block_train}


def mrla_base(heads, v):
    queries, keys, values = map(np.array, zip(*map(query_key_value, v["x"], v["wq"], v["wk"], v["wv"]), strict=True))
    outs = []
    for t, query in enumerate(queries, start=1):
        products = per_head(query * keys[:t], heads).sum(axis=-1) / np.sqrt(keys.shape[-1] / heads)
        weights = softmax(products, axis=0).repeat(keys.shape[-1] // heads, axis=-1)
        outs.append((spatial(weights) * values[:t]).sum(axis=0))
    normed = normalize(v, "bn", outs[-1], None)
    outputs = {"out_layer": np.stack(outs), "keys": keys.swapaxes(0, 1), "_last": outs[-1]}
    return outputs | {"out_block_last_eval": v["x"][-1] + normed, "out_block_last_eval_relu": v["x"][-1] + relu(normed)}


# Files of any shape.


class Case(NamedTuple):
    """A file to be: its given arrays' shapes, what comes of them, and each gradient's input and output."""

    shapes: dict
    evaluate: object
    gradients: dict
    hyper: dict


def of_norm(name, channels):
    return {f"{name}_{part}": (channels,) for part in ("gamma", "beta", "running_mean", "running_var")}


def of_branch(branch, channels, hidden):
    reduce = {f"{branch}_reduce_weight": (hidden, channels), f"{branch}_reduce_bias": (hidden,)}
    expand = {f"{branch}_expand_weight": (channels, hidden), f"{branch}_expand_bias": (channels,)}
    return reduce | expand | of_norm(f"{branch}_bn1", hidden) | of_norm(f"{branch}_bn2", channels)


def fusion(formula, batch, channels, r, *size):
    inputs = ("x",) if formula is ms_cam else ("x", "y")
    shapes = dict.fromkeys(inputs, (batch, channels, *size))
    for branch in ("local", "global", "local2", "global2") if formula is iaff else ("local", "global"):
        shapes |= of_branch(branch, channels, channels // r)
    modes = ("eval", "train") if batch > 1 else ("eval",)
    gradients = {f"grad_{name}_{mode}": (name, f"out_{mode}") for name in inputs for mode in modes}
    return Case(shapes, functools.partial(in_both_modes, formula), gradients, {"r": r})


def of_afi(features, batch, channels, r, *size):
    shapes = {"x": (features, batch, channels, *size), "w1": (channels // r, channels), "w2": (channels, channels // r)}
    return Case(shapes, afi, {"grad_x": ("x", "out")}, {"features": features, "r": r})


def of_afi_block(features, batch, channels, own, r, *size):
    shapes = {"x": (batch, channels, *size), "prev": (features, batch, own, *size)}
    shapes |= {"conv1_weight": (own, channels, 3, 3), "conv2_weight": (channels, 2 * own, 3, 3)}
    shapes |= {"w1": (own // r, own), "w2": (own, own // r)} | of_norm("bn1", own) | of_norm("bn2", channels)
    gradients = {f"grad_{name}_train": (name, "out_train") for name in ("x", "prev")}
    return Case(shapes, afi_basic_block, gradients, {"r": r})


def of_light(batch, heads, dim_per_head, kernel, *size):
    channels = heads * dim_per_head
    shapes = {"x": (batch, channels, *size), "o_prev": (batch, channels, *size), "wv": (channels, 3, 3)}
    shapes |= {"wq": (kernel,), "wk": (kernel,), "lam": (channels,)} | of_norm("bn", channels)
    gradients = {"grad_x_layer": ("x", "out_layer")}
    for name in ("x", "o_prev"):
        gradients |= {f"grad_{name}_{out}": (name, f"out_{out}") for out in ("module", "block_train")}
    return Case(shapes, functools.partial(mrla_light, heads), gradients, {"heads": heads})


def of_base(layers, batch, heads, dim_per_head, kernel, *size):
    channels = heads * dim_per_head
    shapes = {"x": (layers, batch, channels, *size), "wv": (layers, channels, 3, 3)}
    shapes |= {"wq": (layers, kernel), "wk": (layers, kernel)} | of_norm("bn", channels)
    return Case(
        shapes, functools.partial(mrla_base, heads), {"grad_x_last": ("x", "_last")}, {"dim_per_head": dim_per_head}
    )


CASES = {
    "ms_cam": fusion(ms_cam, 3, 10, 4, 5, 3),
    "ms_cam, one image": fusion(ms_cam, 1, 7, 3, 4, 6),
    "aff": fusion(aff, 5, 11, 3, 3, 8),
    "aff, one image": fusion(aff, 1, 6, 6, 1, 1),
    "iaff": fusion(iaff, 3, 9, 2, 6, 2),
    "iaff, one image": fusion(iaff, 1, 5, 4, 2, 3),
    "afi": of_afi(5, 2, 10, 3, 4, 7),
    "afi, one feature": of_afi(1, 1, 5, 1, 3, 2),
    "afi block, half": of_afi_block(2, 4, 10, 5, 4, 5, 4),
    "afi block, expanded": of_afi_block(1, 2, 6, 6, 5, 3, 6),
    "mrla light": of_light(3, 3, 4, 5, 5, 4),
    "mrla light, one head": of_light(1, 1, 6, 1, 2, 5),
    "mrla base": of_base(3, 2, 4, 3, 7, 3, 6),
    "mrla base, one layer": of_base(1, 1, 2, 5, 3, 4, 3),
}


def drawn(shapes, rng):
    """float32 numbers, as float64; variances and scales are positive."""
    values = {}
    for name, shape in shapes.items():
        normal = rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])) if "weight" in name else 1)
        positive = name.endswith(("_var", "_gamma"))
        values[name] = (0.5 + rng.random(shape) if positive else normal).astype(np.float32).astype(np.float64)
    return values


def along(case, values, gradient, direction):
    """Derivative of sum(cotangent * output) by central differences."""
    name, output = case.gradients[gradient]
    ahead, behind = (
        (values["cotangent"] * case.evaluate(values | {name: values[name] + step * direction})[output]).sum()
        for step in (1e-6, -1e-6)
    )
    return (ahead - behind) / 2e-6


@pytest.mark.parametrize("name", CASES)
def test_so_it_is_with_any_shapes_and_under_any_name(name, tmp_path):
    case, rng = CASES[name], np.random.default_rng(len(name))
    values = drawn(case.shapes, rng)
    values["cotangent"] = rng.standard_normal(values["x"].shape[-4:]).astype(np.float32).astype(np.float64)
    expected = {key: output for key, output in case.evaluate(values).items() if not key.startswith("_")}
    gradients = {key: np.full(case.shapes[of], np.nan) for key, (of, _) in case.gradients.items()}
    path = tmp_path / "somewhere" / "b.npz"
    path.parent.mkdir()
    arrays = {key: array.astype(np.float32) for key, array in (values | expected | gradients).items()}
    np.savez(path, meta=json.dumps({"module": name, "hyper": case.hyper, "set": "B"}), **arrays)

    ours = run_golden(str(path))
    assert ours.keys() == expected.keys() | gradients.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(ours[key], array, **TOLERANCE, err_msg=key)
    for key, gradient in gradients.items():
        assert ours[key].shape == gradient.shape
        direction = rng.standard_normal(gradient.shape)
        by_hand = along(case, values, key, direction)
        assert (ours[key] * direction).sum() == pytest.approx(by_hand, rel=1e-4, abs=1e-4), key
