"""The hybrid in differentiable PyTorch and what is trained with it: attention transfer, LoRA, checkpoints, the command."""

import dataclasses
import doctest
import json
import os
import signal

import checkpoints
import hf_models as hf
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lola
import lola.torch
from lola.models import Llama, train_needle
from lola.torch import distill, hybrid, loop
from lola.torch.loop import Allocations, Unfinished, falling, fit

MIXINGS = ("paper", "gated", "lolcats", "cache_only")
BASE = lola.Config(window=8, chunk=4, sparse=0, mixing="lolcats")
FOLDING = lola.Config(window=8, chunk=4, sparse=6, mixing="gated")


def inputs(tokens=75, heads=4, kv_heads=2, dim=6, value=5, columns=3, dtype=torch.float64, seed=0, grad=False):
    torch.manual_seed(seed)
    q, k = (torch.randn(2, tokens, n, dim, dtype=dtype) * 1.5 for n in (heads, kv_heads))
    v = torch.randn(2, tokens, kv_heads, value, dtype=dtype)
    w_q, w_k = torch.randn(2, heads, dim, columns, dtype=dtype)
    gate = torch.rand(heads, dtype=dtype) * 0.8 + 0.1
    return [x.clone().requires_grad_(grad) for x in (q, k, v, w_q, w_k, gate)]


def attention(config, q, k, v, w_q, w_k, gate, segment=1, **more):
    return hybrid.attention(q, k, v, config=config, w_q=w_q, w_k=w_k, gate=gate, segment=segment, **more)


def test_examples():
    for module in (hybrid, loop, distill):
        with torch.enable_grad():
            result = doctest.testmod(module, extraglobs={"torch": torch, "lola": lola})
        assert result.failed == 0 and result.attempted


# --- the hybrid -----------------------------------------------------------------------------------------------------------


def oracle(config, kind, q, k, v, w_q, w_k, gate):
    class Map:
        name = kind

    Map.w_q, Map.w_k = (None if w is None else w.numpy() for w in (w_q, w_k))
    arrays = (x.numpy() for x in (q, k, v))
    return torch.from_numpy(lola.reference.attention(*arrays, config=config, feature_map=Map, gate=gate.numpy()))


@pytest.mark.parametrize("sparse", [0, 7, 90])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_forward_is_the_oracles(mixing, sparse):
    x = inputs()
    for chunk, per, score in ((4, "query_head", "self_recall"), (4, "kv_head", "self_recall"), (8, "kv_head", "value_norm")):
        config = lola.Config(window=8, chunk=chunk, sparse=sparse, mixing=mixing, sparse_per=per, score=score, scale=0.3)
        wanted = oracle(config, "hedgehog", *x)
        for segment in (1, 40, 512):
            assert hf.difference(attention(config, *x, segment=segment), wanted) < 1e-6 * wanted.std()


@pytest.mark.parametrize("kind", ["hedgehog_exp", "relu", "elu_plus_one"])
@pytest.mark.parametrize("score", ["self_recall", "key_norm", "recency"])
def test_maps_and_scores(kind, score):
    q, k, v, w_q, w_k, gate = inputs()
    w_q, w_k = (None, None) if kind == "elu_plus_one" else (w_q, w_k)
    config = lola.Config(window=12, chunk=4, sparse=7, score=score)
    wanted = oracle(config, kind, q, k, v, w_q, w_k, gate)
    found = attention(config, q, k, v, w_q, w_k, gate, feature_map=kind, segment=20)
    assert hf.difference(found, wanted) < 1e-6 * wanted.std()


@pytest.mark.parametrize("mixing", MIXINGS)
def test_forward_is_the_kernels(mixing):
    q, k, v, w_q, w_k, gate = inputs(tokens=300, dtype=torch.float32)
    config = lola.Config(window=16, chunk=8, sparse=20, mixing=mixing)
    wanted = lola.torch.attention(q, k, v, config=config, feature_map=lola.Hedgehog(w_q.numpy(), w_k.numpy()), gate=gate)
    assert hf.difference(attention(config, q, k, v, w_q, w_k, gate, segment=64), wanted) < 3e-5 * wanted.std()


@pytest.mark.parametrize("tokens", [1, 3, 8, 11, 13])
def test_short_sequences(tokens):
    x = inputs(tokens=tokens)
    wanted = oracle(FOLDING, "hedgehog", *x)
    assert hf.difference(attention(FOLDING, *x), wanted) < 1e-6


@pytest.mark.parametrize("sparse", [0, 5])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_gradients_are_finite_differences(mixing, sparse):
    config = lola.Config(window=8, chunk=4, sparse=sparse, mixing=mixing)
    with torch.enable_grad():
        x = inputs(tokens=45, heads=2, kv_heads=1, dim=4, value=3, columns=2, grad=True)
        assert torch.autograd.gradcheck(lambda *x: attention(config, *x), x, fast_mode=True)


def test_gradients_of_sets_per_kv_head_and_of_other_maps():
    config = dataclasses.replace(FOLDING, sparse_per="kv_head")
    with torch.enable_grad():
        x = inputs(tokens=45, columns=2, grad=True)
        assert torch.autograd.gradcheck(lambda *x: attention(config, *x, feature_map="hedgehog_exp"), x, fast_mode=True)


def test_the_maximum_can_be_left_out_of_the_gradient():
    """As the bundled adapters were trained; the outputs are the same."""
    x = inputs(tokens=45)
    assert torch.equal(attention(BASE, *x), attention(BASE, *x, through_max=False))
    grads = []
    for through in (True, False):
        x = inputs(tokens=45, grad=True)
        with torch.enable_grad():
            attention(BASE, *x, through_max=through).square().sum().backward()
        grads.append(x[0].grad)
    assert hf.difference(*grads) > 1e-3


@pytest.mark.parametrize("config", [BASE, FOLDING])
def test_segments_do_not_matter(config):
    grads = []
    for segment in (1, 24, 512):
        x = inputs(grad=True)
        with torch.enable_grad():
            attention(config, *x, segment=segment).square().sum().backward()
        grads.append([y.grad for y in x])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert (a - b).abs().max() < 1e-12 * a.abs().max()


def test_only_the_choice_is_not_differentiated():
    """At one segment the three steps by hand give the same: plan without a gradient, states and attend with one."""
    q, k, v, w_q, w_k, gate = inputs(tokens=72)
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    fq, fk = hybrid.hedgehog(qt, w_q), hybrid.hedgehog(kt.repeat_interleave(2, 1), w_k)
    made = hybrid.plan(fk, vt.repeat_interleave(2, 1), 4, 8, 6)
    out = hybrid.attend(qt, kt, vt, fq, fk, gate, "gated", 4, 8, made).transpose(1, 2)
    assert hf.difference(out, attention(FOLDING, q, k, v, w_q, w_k, gate)) < 1e-12


def test_allocations_are_counted():
    with Allocations() as seen:
        x = torch.zeros(1000)
        y = x[:10], x.view(10, 100)  # the same memory
        for _ in range(3):
            z = torch.ones(500)
    assert seen.now == 6000 and seen.peak == 8000
    del x, y, z
    assert seen.now == 0


@pytest.mark.parametrize("config", [lola.Config(16, 16, 0, "lolcats"), lola.Config(16, 16, 16, "gated")])
def test_memory_is_linear_in_length(config):
    def peak(tokens, segment):
        with torch.enable_grad(), Allocations() as seen:
            x = inputs(tokens=tokens, dim=16, value=16, columns=8, dtype=torch.float32, grad=True)
            attention(config, *x, segment=segment).square().mean().backward()
        return seen.peak, sum(y.numel() * 4 for y in x)

    peaks = [peak(tokens, 1)[0] for tokens in (256, 512, 1024)]
    assert peaks[1] < 2.1 * peaks[0] and peaks[2] < 2.1 * peaks[1]
    # About q, k, v, the output and the gradients of these; and then the three steps with everything kept for the way back.
    most, bare = peak(1024, 64)
    assert most < 5 * bare < 0.4 * peak(1024, 1024)[0]


def test_hybrid_refuses():
    q, k, v, w_q, w_k, gate = inputs()
    for config, message in (
        (lola.Config(score="random"), "config.score must be one of .* to train with, got 'random'"),
        (lola.Config(score="attention"), "config.score"),
        (lola.Config(score="external"), "config.score"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(config, q, k, v, w_q, w_k, gate)
    with pytest.raises(ValueError, match="gate must be given with mixing 'lolcats'"):
        attention(BASE, q, k, v, w_q, w_k, None)
    with pytest.raises(ValueError, match=r"gate must be \(4,\)"):
        attention(BASE, q, k, v, w_q, w_k, gate[:2])
    with pytest.raises(ValueError, match="w_k must be given"):
        attention(BASE, q, k, v, w_q, None, gate)
    with pytest.raises(ValueError, match=r"w_q must be \(4, 6, ...\)"):
        attention(BASE, q, k, v, w_q[:2], w_k, gate)
    with pytest.raises(ValueError, match="q, k and v must be"):
        attention(BASE, q, k[:, 1:], v, w_q, w_k, gate)
    with pytest.raises(ValueError, match="feature_map must be one of"):
        attention(BASE, q, k, v, w_q, w_k, gate, feature_map="cosine")
    with pytest.raises(TypeError, match="tensor of floats"):
        attention(BASE, q.long(), k, v, w_q, w_k, gate)
    with pytest.raises(TypeError, match="lola.Config"):
        attention({}, q, k, v, w_q, w_k, gate)


# --- training ---------------------------------------------------------------------------------------------------------------


def rows(steps=6, length=48, batch=2, seed=0):
    torch.manual_seed(seed)
    return distill.Rows(torch.randint(2, 97, (1000,)), length, batch, steps)


def snapshot(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def test_rows_are_a_function_of_the_step():
    data = distill.Rows(torch.arange(101), 10, 4, steps=5)
    batches = [data[i] for i in range(len(data))]
    assert all(torch.equal(data[i], batches[i]) for i in (4, 0, 2))
    first = torch.cat(batches)[:, 0]
    assert sorted(first[:10].tolist()) == sorted(first[10:].tolist()) == list(range(0, 100, 10))
    assert first[:10].tolist() != first[10:].tolist() and torch.equal(torch.cat(batches), first[:, None] + torch.arange(11))
    with pytest.raises(ValueError, match="more than one row of 10"):
        distill.Rows(torch.arange(10), 10, 1, 1)


@pytest.mark.parametrize("family", list(hf.FAMILIES))
def test_transfer_lowers_its_loss_and_leaves_the_model(family):
    model, ids = hf.soft(family), hf.prompts()
    before, logits, trainable = snapshot(model), model(ids).logits, [x.requires_grad for x in model.parameters()]
    made = distill.transfer(model, BASE, [rows()[0]] * 30, rates={"maps": 5e-2, "gates": 5e-2}, feature_dim=8)
    assert made.losses[-1] < 0.9 * made.losses[0]
    assert made.lora == {} and made.peak_bytes > 0 and len(made.losses) == 30
    assert made.spec == {"feature_map": "softmax_dim", "window": 8, "chunk": 4, "mixing": "lolcats"}
    assert type(model) is hf.FAMILIES[family][1] and torch.equal(model(ids).logits, logits)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [x.requires_grad for x in model.parameters()] == trainable
    again = distill.transfer(model, BASE, rows(1), maps=made, rates={"maps": 0.0})  # from where it ended
    assert again.losses[0] < 0.9 * made.losses[0]
    assert lola.torch.linearize(model, BASE, made.maps)(ids).logits.isfinite().all()


def test_transfer_teaches_each_layer_its_softmax_heads():
    """The loss by hand: every layer on the softmax model's own inputs."""
    model = hf.soft()
    layers, seen = model.model.layers, []
    hooks = [layer.self_attn.register_forward_hook(lambda m, a, k, out: seen.append((k, out[0])), with_kwargs=True) for layer in layers]
    batch = rows()[0]
    model(batch[:, :-1])
    for hook in hooks:
        hook.remove()
    maps = distill.new_maps(range(3), 4, 8, 4, seed=3)
    total = 0
    for (given, _), student in zip(seen, lola.torch.linearize(hf.soft(), BASE, maps).model.layers):
        attention = student.self_attn
        q, k, v = attention.project(given["hidden_states"], given["position_embeddings"])
        softmax = hybrid.softmax_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        total += 1000 * (attention.differentiable(q, k, v) - softmax).square().mean() / 3
    made = distill.transfer(model, BASE, rows(1), maps=maps, rates={"maps": 0.0})
    assert abs(made.losses[0] - total) < 1e-4 * total
    assert all(torch.equal(made.maps[name], x) for name, x in maps.items() if "window" not in name)


def finetuned(data=None, model=None, config=(FOLDING, BASE), seed=0, **options):
    model = hf.soft() if model is None else model
    maps = distill.new_maps(range(3), 4, 8, 4, seed=3)
    options = {"rates": {"lora": 1e-2, "lora_qk": 5e-3, "gates": 1e-2}, "rank": 3, "alpha": 5, **options}
    return model, distill.finetune(model, config, maps, data or rows(), **options)


def test_finetuning_lowers_its_loss():
    batch = rows(1)[0]
    model, made = finetuned([batch] * 30, config=FOLDING, targets=distill.QKVO + distill.MLP, rates={"lora": 3e-2})
    assert made.losses[-1] < 0.9 * made.losses[0]
    assert len(made.lora) == 3 * 7 * 2 and made.spec["lora"] == {"r": 3, "alpha": 5}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_finetuning_of_other_families(family, tmp_path):
    model = hf.soft(family)
    maps = distill.transfer(model, BASE, rows(2))
    made = distill.finetune(model, FOLDING, maps, [rows()[0]] * 15, rates={"lora": 3e-2})
    assert made.losses[-1] < made.losses[0] and model(hf.prompts()).logits.isfinite().all()
    made.save(tmp_path)
    again = lola.torch.load_lolcats(hf.soft(family), tmp_path, config=FOLDING)
    assert hf.difference(again(hf.prompts()).logits, model(hf.prompts()).logits) < 2e-3


def test_gradients_of_a_whole_model():
    """Of LoRA, maps and gates together, in float64, against finite differences, with layers and logits computed anew."""
    model = hf.soft().double()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):  # which computes in float32
            module.forward = lambda x, w=module.weight: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    run = distill._Finetune(model, FOLDING, distill.new_maps(range(3), 4, 8, 4, 3), 2, 4, distill.QKVO + distill.MLP,
                            {"lora": 1.0, "maps": 1.0, "gates": 1.0}, 1, 16, "fp32", 0)  # fmt: skip
    trained = [x for part in run.parts.values() for x in part.values()]
    for x in trained:
        x.data = x.data.double() + 0.1 * torch.randn_like(x, dtype=torch.float64)
    # No token twice: equal values would tie in the first layer, and rounding decide what is kept.
    batch = torch.stack([torch.randperm(97)[:49] for _ in range(2)])
    direction = [torch.randn_like(x) for x in trained]
    with run, torch.enable_grad():
        for x in trained:
            x.requires_grad_()
        run.loss(0, batch)
        slope = sum((x.grad * d).sum() for x, d in zip(trained, direction)).item()
        found = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for x, d in zip(trained, direction):
                    x.add_(step * d)
            found.append(run.loss(0, batch).item())
            with torch.no_grad():
                for x, d in zip(trained, direction):
                    x.sub_(step * d)
    assert slope == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5)


def test_the_adapter_gives_the_trained_models_logits(tmp_path):
    folder, ids = checkpoints.save(tmp_path / "base", eos_token_id=None), torch.randint(1, 256, (2, 70))
    base = lambda: hf.LlamaForCausalLM.from_pretrained(folder)  # noqa: E731
    model = base()
    data = distill.Rows(torch.randint(1, 256, (500,)), 40, 2, 5)
    maps = distill.transfer(model, BASE, data)
    made = distill.finetune(model, [FOLDING, BASE], maps, data, rates={"lora": 1e-2, "gates": 1e-2})
    made.save(tmp_path / "adapter")
    for layer in model.model.layers:
        layer.self_attn.segment = 16
    with torch.enable_grad():
        wanted = model(ids, use_cache=False).logits.detach()  # by the hybrid
    for layer in model.model.layers:
        layer.self_attn.segment = None
    error = 2e-5 * wanted.abs().max()
    assert hf.difference(model(ids).logits, wanted) < error  # by the kernels
    for merge in (True, False):
        loaded = lola.torch.load_lolcats(base(), tmp_path / "adapter", config=FOLDING, merge=merge)
        assert hf.difference(loaded(ids).logits, wanted) < error
    assert hf.difference(lola.torch.merge_lora(model)(ids).logits, wanted) < error
    found = Llama.from_pretrained(folder, FOLDING, adapter=tmp_path / "adapter")(ids.numpy())
    assert hf.difference(torch.from_numpy(found), wanted) < error
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["mixing"] == "lolcats"


def test_rows_at_once_and_segments_change_nothing():
    data = [(batch, torch.rand(batch.shape)) for batch in (rows(3, batch=5)[i] for i in range(3))]
    wanted = finetuned(data)[1]
    for options in ({"rows_at_once": 2}, {"segment": 16}):
        found = finetuned(data, **options)[1]
        assert np.allclose(found.losses, wanted.losses, rtol=1e-4)
    wanted = distill.transfer(hf.soft(), BASE, data)
    assert np.allclose(distill.transfer(hf.soft(), BASE, data, rows_at_once=2).losses, wanted.losses, rtol=1e-4)


def test_weights_of_targets():
    ids = rows(1)[0]
    some = torch.zeros(ids.shape)
    some[:, 5] = 7
    model = lola.torch.linearize(hf.soft(), FOLDING, distill.new_maps(range(3), 4, 8, 4, 3))
    logits = model(ids[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, 4], ids[:, 5])
    assert finetuned([(ids, some)], config=FOLDING)[1].losses[0] == pytest.approx(wanted.item(), rel=1e-4)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert finetuned([ids], config=FOLDING)[1].losses[0] == pytest.approx(wanted.item(), rel=1e-4)


def test_bfloat16():
    model = hf.soft().bfloat16()
    made = distill.transfer(model, BASE, rows(4), precision="bf16")
    wanted = distill.transfer(hf.soft(), BASE, rows(4))
    assert np.allclose(made.losses, wanted.losses, rtol=0.05)
    made = distill.finetune(model, FOLDING, made, rows(4), precision="bf16")
    assert np.isfinite(made.losses).all() and {x.dtype for x in made.lora.values()} == {torch.float32}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.lora_a.dtype == torch.float32


# --- killed and resumed ---------------------------------------------------------------------------------------------------------


class Deadly:
    """Data whose batch `at` is the process's last."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def __len__(self):
        return len(self.data)

    def __getitem__(self, step):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[step]


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_killed_halfway_it_resumes_to_the_same(stage, tmp_path):
    def train(data, folder, resume=False):
        if stage == "transfer":
            return distill.transfer(hf.soft(), [BASE, FOLDING], data, folder=folder, resume=resume, save_steps=2)
        return finetuned(data, folder=folder, resume=resume, save_steps=2)[1]

    wanted = train(rows(9), tmp_path / "whole")
    child = os.fork()
    if child == 0:
        train(Deadly(rows(9), 5), tmp_path / "killed")  # dies by its own hand after step 4's checkpoint
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / f"{stage}.ckpt", weights_only=True)["step"] == 4
    torch.rand(7)  # another state of the random numbers
    found = train(rows(9), tmp_path / "killed", resume=True)
    assert found.losses == wanted.losses
    for a, b in ((found.maps, wanted.maps), (found.lora, wanted.lora)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = train(rows(9), tmp_path / "killed", resume=True)  # finished: nothing to do
    assert again.losses == wanted.losses and all(torch.equal(again.maps[name], x) for name, x in wanted.maps.items())


def test_the_loop_keeps_random_states_and_refuses_other_runs(tmp_path, capsys):
    def run(steps=8, seconds=1e9, rate=0.1, **options):
        torch.manual_seed(5)
        weights = {"w": torch.ones(3)}

        def loss(step, batch):
            value = ((weights["w"] * torch.rand(3) - batch) ** 2).sum()
            value.backward()
            return value.detach()[None]

        with torch.enable_grad():
            parts, batches = {"all": weights, "rest": {}}, torch.arange(float(steps))
            done = fit("loop", parts, {"all": rate}, batches, loss, falling, seconds=seconds, **options)
        return done.losses, weights["w"]

    wanted, weights = run()
    assert "loop: step 8/8, loss [" in capsys.readouterr().out
    with pytest.raises(Unfinished, match="1 of 8"):
        run(seconds=0, folder=tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        run(folder=tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        run(folder=tmp_path, resume=True, rate=0.2)
    found, again = run(folder=tmp_path, resume=True)
    assert found == wanted and torch.equal(again, weights)
    with pytest.raises(RuntimeError, match="not finite"):
        run(rate=float("inf"))


def test_needles_training_script(tmp_path, monkeypatch):
    """Each stage at a toy size; a stage that was stopped goes on to the same weights."""

    def stage(name, folder, **options):
        more = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        train_needle.main([name, "--out", str(folder), "--tiny", "--device", "cpu", "--workers", "0", *more])

    size = dataclasses.replace(train_needle.TINY, teacher=((2, ((256, 1),)),), bytes_per_step=256, short=256, long=256)
    monkeypatch.setattr(train_needle, "TINY", size)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        with torch.enable_grad():
            for name in ("teacher", "transfer", "lora"):
                if folder == cut:
                    with pytest.raises(SystemExit, match="run the stage again"):
                        stage(name, folder, seconds=0)
                stage(name, folder)
    for name in ("model.safetensors", "transfer.safetensors", "needle/feature_maps.safetensors", "needle/lora.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    stage("export", whole)
    assert Llama.from_pretrained(whole / "hf", lola.Config(window=16, chunk=16), adapter=whole / "hf" / "needle").adapter.rank == 16


def test_needles_recipe():
    (data, recipe), (weighted, second) = train_needle.as_distilled(2, 3)
    assert len(data) == 2 and len(weighted) == 3 and recipe["config"] == [lola.Config(sparse=0, mixing="lolcats")]
    assert [config.sparse for config in second["config"]] == [32, 64, 0] and second["rank"] == 16
    tokens, weights = weighted[0]
    assert tokens.shape == weights.shape == (32, 1025) and weights[:, 1:].sum() == pytest.approx(1.3, rel=1e-4)


# --- refusals -------------------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    model, data = hf.soft(), rows()
    maps = distill.new_maps(range(3), 4, 8, 4, 0)
    refused = [
        (ValueError, "config.score", lambda: distill.transfer(model, lola.Config(score="random"), data)),
        (ValueError, "one window and chunk", lambda: distill.transfer(model, [BASE, lola.Config()], data)),
        (TypeError, "config must be a lola.Config", lambda: distill.transfer(model, "lolcats", data)),
        (ValueError, "feature_map must be one of", lambda: distill.transfer(model, BASE, data, feature_map="relu")),
        (TypeError, "data must have len", lambda: distill.transfer(model, BASE, None)),
        (ValueError, "at least one batch", lambda: distill.transfer(model, BASE, [])),
        (ValueError, "rates must be for some of maps, gates", lambda: distill.transfer(model, BASE, data, rates={"lora": 1})),
        (ValueError, "precision must be", lambda: distill.transfer(model, BASE, data, precision="fp16")),
        (ValueError, "rows_at_once must be", lambda: distill.transfer(model, BASE, data, rows_at_once=0)),
        (ValueError, r"integers \(rows, length \+ 1\)", lambda: distill.transfer(model, BASE, [torch.zeros(2, 9)])),
        (ValueError, "maps must hold the model's own", lambda: distill.transfer(model, BASE, data, maps={"x": torch.zeros(1)})),
        (ValueError, "maps must be given", lambda: distill.finetune(model, BASE, None, data)),
        (ValueError, "targets must be some of", lambda: distill.finetune(model, BASE, maps, data, targets=["w1"])),
        (ValueError, "rank must be", lambda: distill.finetune(model, BASE, maps, data, rank=0)),
        (ValueError, "lack layers.0", lambda: distill.finetune(model, BASE, {k: x for k, x in maps.items() if "layers.0" not in k}, data)),
    ]  # fmt: skip
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
        assert type(model) is hf.LlamaForCausalLM and model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="linearised before"):
        distill.transfer(hf.linear(), BASE, data)
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        distill.transfer(model.model, BASE, data)
    with pytest.raises(ValueError, match="sliding window"):
        distill.transfer(hf.soft("mistral", sliding_window=16), BASE, data)
    with pytest.raises(ValueError, match="weights of a batch"):
        finetuned([(data[0], torch.ones(3))])


def test_a_layer_that_trains_refuses_padding_and_caches():
    model = hf.linear()
    for layer in model.model.layers:
        layer.self_attn.segment = 16
    ids, mask = hf.padded(hf.prompts(), [60, 50])
    with torch.enable_grad():
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids)
        with pytest.raises(ValueError, match="without padding"):
            model(ids, attention_mask=mask, use_cache=False)
        model(ids, use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.feature_map_q.mlp.layer.grad.abs().max() > 0
    model(ids)  # without gradients the kernels run


# --- the command ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    checkpoints.save(tmp_path / "base", eos_token_id=None)
    (tmp_path / "text.txt").write_text("In the beginning there was a needle, and the needle was in a haystack.\n" * 20)
    sizes = "--length 64 --rows 2 --window 8 --chunk 4 --steps 3 --lora-steps 3 --device cpu"
    return tmp_path, ["--model", str(tmp_path / "base"), "--text", str(tmp_path / "text.txt"), *sizes.split()]


def test_the_command(words, capsys):
    folder, arguments = words
    distill.main([*arguments, "--out", str(folder / "whole")])
    said = capsys.readouterr().out
    assert "transfer: step 3/3, 2 x 64 tokens, loss [" in said and "peak memory" in said and "load_lolcats" in said
    assert sorted(path.name for path in (folder / "whole").iterdir()) == [
        "adapter.json", "feature_maps.safetensors", "lora.safetensors", "report.json", "run.json"
    ]  # fmt: skip
    assert lola.torch.load_lolcats(folder / "base", folder / "whole")(hf.prompts()).logits.isfinite().all()
    with pytest.raises(SystemExit, match="not empty"):
        distill.main([*arguments, "--out", str(folder / "whole")])
    distill.main([*arguments, "--out", str(folder / "whole"), "--resume"])
    assert "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another --rank"):
        distill.main([*arguments, "--out", str(folder / "whole"), "--resume", "--rank", "3"])
    with pytest.raises(SystemExit, match="needle-tasks are bytes"):
        distill.main([*arguments, "--text", "needle-tasks", "--out", str(folder / "other")])


def test_a_dry_run(words, capsys):
    folder, arguments = words
    distill.main([*arguments, "--dry-run", "--window", "32", "--chunk", "32", "--lora-attention", "gated:4"])
    said = capsys.readouterr().out
    assert "counted without computing" in said and "finetune  peak" in said
    distill.main(["--dry-run", "--device", "cpu", "--length", "256", "--rows", "1"])
    said = capsys.readouterr().out
    peaks = [float(line.split("peak")[1].split("GiB")[0]) for line in said.splitlines()[1:]]
    assert "8B-shaped" in said and 14.95 < peaks[0] < peaks[1] < 17
    with pytest.raises(SystemExit):
        distill.main(["--model", "x"])


def test_many_layers_are_reckoned_from_few():
    shape, config = hf.LlamaConfig(**{**hf.SIZES, "num_hidden_layers": 5}), lola.Config(32, 32, 16)
    found = [distill.count_memory(shape, "finetune", length=96, config=config, reckon=reckon) for reckon in (True, False)]
    assert found[0] == found[1] and shape.num_hidden_layers == 5
