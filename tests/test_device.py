"""What CUDA needs, held without a GPU: stand-ins for its streams, its graph and its processes."""

import atexit
import contextlib
import copy
import datetime
import functools
import itertools
import platform
import resource
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import reference
import roofline
import torch
from test_steps import double_batch, in_double

import common
import harness
import mixlc_acgan
import pix2pix
import support.begin
import support.device
import support.run
from files import CLASSES, vgg_file
from forks import forked
from graphs import record_graphs
from runs import line_of, refused, state_of, stop_after, tiny_run
from support.begin import begin
from support.channels_last import InstanceNorm, stay_channels_last
from support.device import GraphedStep, start
from support.processes import first_on_machine, reduced
from support.run import Means
from tensors import as_rank, calls_of, pictures, tiny

STATE = types.SimpleNamespace()


def test_a_step_that_counts_in_python_is_refused(monkeypatch, capsys):
    """A graph would repeat the branch that it was captured with."""
    record_graphs(monkeypatch)
    state = types.SimpleNamespace(steps=0)

    def train_step(state, batch, cfg):
        state.steps += 1
        return {"loss": batch[0].sum()}

    step = GraphedStep(train_step)
    main = common.command(lambda argv: [step(state, (torch.zeros(1),), None) for _ in range(9)])
    assert "cannot: --no-graph" in line_of(main, None, capsys) and state.steps == 4
    state.mean = torch.zeros(())

    def averaging(state, batch, cfg):
        state.mean = (state.mean + batch[0].sum()) / 2  # and not in place
        return {"loss": state.mean}

    step = GraphedStep(averaging)
    assert "cannot: --no-graph" in line_of(main, None, capsys)


def test_a_graph_has_tensors_of_its_own_and_no_autograd_graph(monkeypatch):
    """The batch that it was captured with stays the loader's; warm-ups share one side stream."""
    record_graphs(monkeypatch)
    weight = torch.ones(1, requires_grad=True)
    step = GraphedStep(lambda state, batch, cfg: {"loss": (weight * batch[0]).sum()})
    batches = [(torch.full((2,), float(k)),) for k in range(6)]
    for batch in batches:
        assert not step(STATE, batch, None)["loss"].requires_grad
    assert step.graph.replays == 3 and torch.cuda.Stream.call_count == 1
    assert torch.equal(step.batch[0], torch.full((2,), 5.0))
    assert [batch[0][0].item() for batch in batches] == [0, 1, 2, 3, 4, 5]


def test_out_of_memory_while_capturing_is_one_line(monkeypatch, capsys):
    """The capture that is broken off raises an error of its own on its way out."""
    record_graphs(monkeypatch)

    @contextlib.contextmanager
    def capture(graph, **_):
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    def train_step(state, batch, cfg):
        if step.calls > GraphedStep.warmup:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"loss": batch[0].sum()}

    monkeypatch.setattr(torch.cuda, "graph", capture)
    step = GraphedStep(train_step)
    main = common.command(lambda argv: [step(STATE, (torch.zeros(1),), None) for _ in range(9)])
    assert "out of memory: lower --batch-size" in line_of(main, None, capsys)
    assert step.graph is None


def test_the_first_process_of_each_machine_writes_files(monkeypatch):
    for rank, local, first in ((0, 0, True), (3, 0, True), (3, 1, False)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert first_on_machine() == first


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_process_takes_its_gpu_before_it_joins_the_others(monkeypatch, asked):
    calls, now = [], functools.partial(signal.getsignal, signal.SIGTERM)
    signal.signal(signal.SIGTERM, ours := lambda *_: None)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for module, name, replaced in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "set_device", lambda device: calls.append(("set", device))),
        (torch.distributed, "is_initialized", lambda: False),
        (torch.distributed, "init_process_group", lambda *a, **how: calls.append((*a, how, now()))),
        (atexit, "register", lambda f: calls.append(("exit", f))),
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "allow_tf32", True),
    ):
        monkeypatch.setattr(module, name, replaced)
    device = start(tiny("pix2pix", device=asked)[1])
    assert device == torch.device("cuda", 1)
    assert common.fast_step(start, tiny("pix2pix", graph=False)[1], device) is start
    (_, first), (backend, about, waiting), (_, destroy) = calls
    assert waiting is signal.SIG_DFL and now() is ours  # a wait for processes that never come ends
    assert first == device and backend == "nccl" and about["device_id"] == device
    assert about["timeout"] >= datetime.timedelta(hours=1)  # one builds the store, others wait
    assert destroy is torch.distributed.destroy_process_group
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")  # all refuse, as one alone would let the others wait
    with refused("--nproc-per-node: only 1 GPUs"):
        start(tiny("pix2pix", device="cuda")[1])


def test_what_processes_reduce_is_on_the_device_of_their_group(monkeypatch):
    """NCCL refuses tensors of the CPU: the sums of a run that goes on come from a file."""
    as_rank(monkeypatch, 0)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    seen = calls_of(monkeypatch, torch.distributed, "all_reduce", lambda *_: None)
    honest = torch.Tensor.to
    gpu = lambda x, device, **how: honest(x, "meta" if device == "cuda" else device)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", gpu)
    reduced(torch.ones(3))
    assert seen[0][0].device == torch.device("meta")


def test_sums_of_a_checkpoint_and_colours_of_classes_are_on_the_device():
    losses = Means((["g"], torch.ones(1), 1))
    losses.add(["g"], torch.ones(1, device="meta"))
    assert losses.sums.device == torch.device("meta")
    pix2pix.nearest_class(torch.zeros(1, 3, 8, 8, device="meta"), CLASSES)  # refuses others


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_is_seeded_as_by_manual_seed(rank, monkeypatch):
    """Every process by its own number."""
    as_rank(monkeypatch, rank)
    common.seed_step(3, 1, 4)
    got = torch.rand(5)
    words = np.random.SeedSequence([3, 1, 4, rank]).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
    assert torch.equal(got, torch.rand(5))


def test_gradients_and_logged_losses_are_averaged(monkeypatch):
    as_rank(monkeypatch, 0)
    add = lambda tensor, *_: tensor.mul_(2).add_(4)  # noqa: E731  the other has 4 more
    monkeypatch.setattr(torch.distributed, "all_reduce", add)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    losses = Means()
    losses.add(["g"], torch.tensor([3.0]))
    assert losses.read() == {"g": 5}
    for _ in range(2):  # what is reduced is a copy
        assert losses.saved()[1].tolist() == [5]
    with pytest.raises(ValueError, match="in steps before"):  # another loss
        losses.add(["d"], torch.tensor([3.0]))
    layer = torch.nn.Linear(2, 1)
    (layer.weight.sum() * 3 + layer.bias.sum()).backward()
    common.average_gradients(layer)
    assert layer.weight.grad.tolist() == [[5, 5]] and layer.bias.grad.tolist() == [3]


@pytest.mark.parametrize(("norm", "own"), [("batch", True), ("running", False)])
def test_generating_uses_the_statistics_of_eval_norm(norm, own):
    layer = torch.nn.BatchNorm2d(3)
    layer.running_mean += 7
    before, x = layer.running_mean.clone(), pictures()
    with common.generating(torch.nn.Sequential(layer), tiny("pix2pix", eval_norm=norm)[1]):
        assert (layer(x).mean().abs() < 1e-5) == own
    assert torch.equal(layer.running_mean, before)
    assert layer.training and layer.track_running_stats


def test_uneven_padding_stays_uneven():
    uneven = torch.nn.Sequential(torch.nn.ReflectionPad2d((1, 2, 3, 4)))
    stay_channels_last(uneven)
    assert uneven(pictures()).shape[2:] == (64 + 7, 64 + 3)


@pytest.mark.parametrize("case", ["cyclegan", "pix2pix"])
@pytest.mark.parametrize("count", [1, 2])
def test_layers_that_stay_channels_last_are_right(case, count, monkeypatch):
    """Against PyTorch's own in NCHW and float64: outputs, gradients; every layout stays."""
    monkeypatch.setattr(support.device, "has_avx512", lambda: False)  # built in NCHW
    options = {"norm": "instance", "generator": "resnet"} if case == "pix2pix" else {}
    module, cfg = tiny(case, width=2, blocks=1, **options)
    state = module.build(cfg, torch.device("cpu"))
    plain = (state.G if case == "pix2pix" else state.G_AB).double()
    for layer in plain.modules():
        if isinstance(layer, torch.nn.InstanceNorm2d) and case == "pix2pix":  # as a user may wish
            scale, shift = torch.rand(2, layer.num_features).double()
            layer.weight, layer.bias = torch.nn.Parameter(scale), torch.nn.Parameter(shift)
            layer.eps = 0.1
    net, x = copy.deepcopy(plain).to(memory_format=torch.channels_last), pictures(0, count).double()
    assert not any(isinstance(module, InstanceNorm) for module in plain.modules())
    stay_channels_last(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert "ReflectionPad2d" not in [type(module).__name__ for module in net.modules()]
    outputs = []
    for layer in net.modules():
        layer.register_forward_hook(lambda *given: outputs.append(given[-1]))
    results = []
    for network, image in ((plain, x), (net, x.to(memory_format=torch.channels_last))):
        image = image.clone().requires_grad_()
        out = network(image)
        out.square().mean().backward()
        results.append([out, image.grad, *(weight.grad for weight in network.parameters())])
    for want, got in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-14)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outputs)


@pytest.mark.parametrize("avx512", [True, False])
def test_the_layout_is_what_measures_fastest(avx512, monkeypatch):
    """channels_last on CUDA; on the CPU with AVX-512 and InstanceNorm alone."""
    monkeypatch.setattr(support.device, "has_avx512", lambda: avx512)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, device, memory_format: memory_format)
    for device, norm in itertools.product(("cuda", "cpu"), ("InstanceNorm2d", "BatchNorm2d")):
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), getattr(torch.nn, norm)(4))
        last = device == "cuda" or (avx512 and norm == "InstanceNorm2d")
        want = torch.channels_last if last else torch.contiguous_format
        assert common.to_device(net, torch.device(device)) == want
        assert isinstance(net[1], InstanceNorm) == (last and norm == "InstanceNorm2d")


def test_vgg_in_bf16_keeps_the_direction_of_the_gradient(tmp_path):
    """Losses within 2 %; activations in bf16 become float32 before their Gram matrices."""
    vgg_file(tmp_path / "vgg.pth")
    fake, target = pictures(0, 1, 16).requires_grad_(), pictures(1, 1, 16)
    autocast = common.autocast(tiny("pix2pix", precision="bf16")[1], fake.device)
    found = []
    for given in (None, autocast):
        vgg = common.VGG16Features(["relu1_2"], "vgg16", str(tmp_path / "vgg.pth"), given)
        (features,) = vgg(target)
        unscaled = features / vgg.scales[0]
        in_bf16 = torch.allclose(unscaled, unscaled.bfloat16().float(), rtol=1e-6)
        assert in_bf16 == (given is not None) and features.dtype == torch.float32
        for loss in (mixlc_acgan.style_loss, pix2pix.vgg_loss):
            value = loss(vgg, fake, target)
            assert value.dtype == torch.float32
            found.append((value.item(), torch.autograd.grad(value, fake)[0].flatten()))
    for (loss, gradient), (rough, rough_gradient) in zip(found[:2], found[2:], strict=True):
        assert rough == pytest.approx(loss, rel=0.02) and rough != loss
        assert torch.cosine_similarity(gradient, rough_gradient, dim=0) > 0.99
    random = common.VGG16Features(["relu2_2"], "random", "", autocast)
    assert random.autocast is not autocast


def page_faults(path):
    """Writes their number with memory kept, as a share of that without."""
    found = []
    for prepare in (lambda: None, support.device.keep_memory):
        prepare()
        for _ in range(4):  # by the last one the heap has grown
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(2**24) for _ in range(4)]
            del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    path.write_text(str(found[1] / found[0]))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own switch")
def test_a_run_on_the_cpu_keeps_freed_memory(tmp_path):
    """Four blocks of 64 MiB, freed, are there again without a page fault for each of theirs."""
    share, log = tmp_path / "share", tmp_path / "log"
    forked(page_faults, share, log=log).join()
    assert float(share.read_text()) < 0.5, log.read_text()


def test_a_run_on_the_cpu_asks_to_keep_freed_memory(monkeypatch):
    calls = calls_of(monkeypatch, support.device, "keep_memory")
    start(tiny("pix2pix", device="cpu")[1])
    assert calls == [()]
    glibc = types.SimpleNamespace(mallopt=lambda *how: calls.append(how))
    monkeypatch.setattr(support.device.ctypes, "CDLL", lambda _: glibc)
    monkeypatch.setattr(support.device.sys, "platform", "linux")
    support.device.keep_memory()
    assert calls[2:] == [(-4, 0), (-1, 2**31 - 1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux's own list")
def test_avx512_is_found():
    flags = Path("/proc/cpuinfo").read_text()
    assert support.device.has_avx512() == ("avx512bw" in flags and "avx512vl" in flags)


@pytest.mark.parametrize("avx512", [True, False])
def test_bf16_of_training_is_used_where_the_cpu_is_fast_at_it(
    trained, tmp_path, avx512, monkeypatch
):
    """Without AVX-512 a use of a checkpoint computes in float32, unless told otherwise."""
    checkpoint = state_of(trained("pix2pix") / "checkpoints" / "last.pt")
    checkpoint["config"]["precision"] = "bf16"
    torch.save(checkpoint, tmp_path / "bf16.pt")
    argv = ["--evaluate", "--device", "cpu", "--checkpoint", str(tmp_path / "bf16.pt")]
    for module in (support.begin, support.device):
        monkeypatch.setattr(module, "has_avx512", lambda: avx512)
    for typed in ([], ["--precision", "bf16"]):
        cfg, device, _ = begin(pix2pix.Config, "", {}, argv + typed)
        with common.autocast(cfg, device):
            assert torch.is_autocast_enabled("cpu") == (avx512 or bool(typed))


FASTER = [  # whether there is AMX, and AVX-512; options; what a new run is told
    (True, True, {}, "--precision bf16"),
    (False, True, {}, ""),
    (True, True, {"quick": True}, ""),
    (True, True, {"precision": "fp32"}, ""),
    (True, True, {"precision": "bf16"}, ""),
    (True, False, {"precision": "bf16"}, "--precision fp32"),
    (True, False, {"precision": "bf16", "device": "cuda"}, ""),
]


@pytest.mark.parametrize(("amx", "avx512", "options", "remark"), FASTER)
def test_a_faster_precision_is_recommended(amx, avx512, options, remark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(support.device, "has_avx512", lambda: avx512)
    support.device.recommend_precision(pix2pix.Config(**{"device": "cpu"} | options))
    said = capsys.readouterr().err
    assert remark in said and bool(said) == bool(remark)


def test_a_new_run_alone_hears_of_a_faster_precision(pairs, tmp_path, monkeypatch):
    """Not one that is resumed, or refused."""
    told, run = calls_of(monkeypatch, support.run, "recommend_precision"), tmp_path / "run"
    stop_after(1, pix2pix.main, tiny_run("pix2pix", pairs, run, "--epochs 1"), monkeypatch)
    pix2pix.main(["--resume", "--out", str(run)])
    shutil.copytree(pairs, tmp_path / "broken")
    (tmp_path / "broken" / "train" / "1.png").write_bytes(b"rubbish")
    with pytest.raises(SystemExit):
        pix2pix.main(tiny_run("pix2pix", tmp_path / "broken", tmp_path / "other"))
    assert len(told) == 1


def test_benchmarks_compute_as_training_does(monkeypatch):
    """Without TF32, each convolution by its fastest algorithm."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    harness.config("pix2pix")
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("script", reference.STEPS)
def test_the_reference_step_trains_as_the_scripts_do(script):
    """Which justifies that the benchmarks time one beside the other."""
    more = {"dropout": 0.0} if script == "pix2pix" else {"pool_size": 2}
    module, cfg = tiny(script, width=2, **more)
    ours = in_double(module.build(cfg, torch.device("cpu")))
    theirs = copy.deepcopy(ours)
    for k in range(3):
        batch, losses = double_batch(script, cfg, seed=k), []
        for step, state in ((module.train_step, ours), (reference.STEPS[script], theirs)):
            torch.manual_seed(k)
            losses.append(step(state, batch, cfg))
        for name, loss in losses[1].items():
            assert losses[0][name].item() == pytest.approx(loss.item(), rel=1e-9), (k, name)


@pytest.mark.slow
def test_the_roofline_counts_every_convolution_of_a_step():
    """As PyTorch counts; it takes the gradients of D's weights in G's update for wanted, too."""
    script = "mixlc_acgan"
    small = {"size": 64, "batch_size": 1, "width": 32, "style_layers": "relu2_1"}
    state, cfg, step = harness.prepare(script, harness.FAST, "cpu", **small)
    batch, gflop = harness.random_batch(script, cfg, "cpu"), 0
    found = roofline.convolutions(lambda: step(state, batch, cfg))
    for call, (forwards, backwards) in found.items():
        gflop += roofline.gflop(call) * (forwards + sum(call.gradients) * backwards)
    want = harness.step_flops(script, **small) / 1e9
    assert gflop == pytest.approx(want, rel=0.05)


def test_the_first_weights_follow_the_seed():
    numbers = []
    for seed in (0, 1, 1):
        start(tiny("pix2pix", device="cpu", seed=seed)[1])
        numbers.append(torch.rand(1).item())
    assert numbers[0] != numbers[1] == numbers[2]
