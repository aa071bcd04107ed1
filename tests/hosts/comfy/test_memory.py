"""Replicas and the host's model management: room is asked for and given back; the host's own split
of CFG over devices. CPU devices with numbers stand for GPUs.
"""

from __future__ import annotations

import gc
from unittest.mock import Mock

import pytest
import torch
from inprocess import build, check_parallel, sample

pytestmark = pytest.mark.usefixtures("host")

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")


def by_host(model):
    return model


def by_copying(model):
    """Without what the host needs for clones of its own, as in versions that make none."""
    model = model.clone()
    model.cached_patcher_init = None
    return model


def loaded_on(device):
    from comfy import model_management

    found = model_management.current_loaded_models
    return [each for each in found if each.model is not None and each.device == device]


@pytest.mark.parametrize("replicas", [by_host, by_copying])
def test_a_device_without_room_is_left_out_of_a_run(room, caplog, replicas):
    """Another run with the same patched model has it again when there is room."""
    from parastep.comfy.node import of_model, patch

    free, asked = room
    model = replicas(build("eps"))
    own, ours = sample(model, "eps"), patch(model, ["cpu", "cpu:1", "cpu:2"], tolerance="rehearse")
    for short in (True, False):
        free.update({FIRST: 1e6}) if short else free.clear()
        caplog.clear(), asked.clear()
        assert torch.equal(sample(ours, "eps"), own)
        report = of_model(ours).report
        assert report.fallback is None and not report.failures
        assert report.ranks == (2 if short else 3) and all(report.evaluations)
        assert bool(loaded_on(FIRST)) != short and loaded_on(SECOND)
        assert {FIRST, SECOND} <= {device for device, _ in asked}
        lines = [line for line in caplog.messages if "cpu:1: room for 0 of 1" in line]
        assert len(lines) == short, caplog.messages


def test_as_many_ranks_on_a_device_as_there_is_room_for(room, monkeypatch, caplog):
    from comfy import model_management
    from comfy.sampler_helpers import estimate_memory

    from parastep.comfy.node import of_model, patch

    free, _ = room
    model = build("eps")
    ours = patch(model, ["cpu", "cpu:1", "cpu:1", "cpu:1", "cpu:2"], tolerance="rehearse")
    one, _ = estimate_memory(model, (1, 4, 8, 8), {})
    monkeypatch.setattr(model_management, "minimum_inference_memory", lambda: 0.0)
    free[FIRST] = 1.1 * model.model_size() + 2.5 * one
    assert torch.equal(sample(ours, "eps"), sample(model, "eps"))
    report = of_model(ours).report
    assert report.ranks == 4 and not report.failures
    assert any("cpu:1: room for 2 of 3 ranks" in line for line in caplog.messages)


def test_without_room_anywhere_the_host_samples_alone(room):
    from parastep.comfy.node import of_model, patch

    free, _ = room
    free.update({FIRST: 0, SECOND: 0})
    model = build("eps")
    ours = patch(model, ["cpu", "cpu:1", "cpu:2"], tolerance="rehearse")
    assert torch.equal(sample(ours, "eps"), sample(model, "eps"))
    assert of_model(ours).report.ranks == 1 and not loaded_on(FIRST) and not loaded_on(SECOND)


@pytest.mark.parametrize("replicas", [by_host, by_copying])
def test_memory_is_given_back(room, replicas):
    """Another model that needs the room gets it; the next run loads the replica again."""
    from comfy import model_management

    from parastep.comfy.node import of_model, patch

    model = replicas(build("eps"))
    own, ours = sample(model, "eps"), patch(model, ["cpu", "cpu:1"], tolerance="rehearse")
    ways = [lambda: model_management.free_memory(1e30, FIRST)]
    if hasattr(model, "deepclone_multigpu"):  # one without unloads what is on its one device
        ways.append(model_management.unload_all_models)
    for give_back in ways:
        assert torch.equal(sample(ours, "eps"), own) and loaded_on(FIRST)
        give_back()
        assert not loaded_on(FIRST)
        assert torch.equal(sample(ours, "eps"), own)
        check_parallel(of_model(ours).report)
    del ours  # as the host does with all that nodes have made, when it frees its cache
    gc.collect()
    assert not loaded_on(FIRST)


def test_models_that_nobody_holds_any_more_are_no_replicas(room, monkeypatch):
    """The host has None in their place until it looks for room the next time."""
    from comfy import model_management

    from parastep.comfy.node import of_model, patch

    real = model_management.loaded_models
    monkeypatch.setattr(model_management, "loaded_models", lambda *given: [None, *real(*given)])
    ours = patch(build("eps"), ["cpu", "cpu:1"])
    sample(ours, "eps")
    assert of_model(ours).report.ranks == 2


def test_a_model_too_large_for_a_device_gets_no_replica_there(monkeypatch, caplog):
    from comfy import model_management

    import parastep.comfy.replicas as replicas

    device = torch.device("cuda:1")  # which is never reached
    monkeypatch.setattr(model_management, "get_total_memory", lambda device: 1e9)
    model = build("eps").clone()
    monkeypatch.setattr(type(model), "model_size", lambda self: 2e9)
    home = model.load_device
    assert replicas.add_replicas(model, [home, device]) == [home]
    assert any("does not fit" in line for line in caplog.messages)


# ---- beside the host's own split of CFG ----------------------------------------------------------


@pytest.fixture
def split(room):
    """The host's node that splits CFG, on three devices."""
    multigpu = pytest.importorskip("comfy.multigpu", reason="this version has no such node")
    return lambda model: multigpu.create_multigpu_deepclones(model, 3)


@pytest.mark.parametrize("order", ["before", "behind"])
def test_both_on_the_same_devices_evaluate_steps_and_say_so(split, order, caplog):
    """Never both on one device: ParaStep's ranks evaluate whole steps, with the bits of a host that
    splits nothing.
    """
    from parastep.comfy.node import of_model, patch

    def ours(model):
        return patch(model, ["cpu", "cpu:1", "cpu:2"], tolerance="rehearse")

    model = build("eps")
    both = ours(split(model)) if order == "before" else split(ours(model))
    assert torch.equal(sample(both, "eps"), sample(model, "eps"))
    check_parallel(of_model(both).report)
    told = any("MultiGPU CFG Split evaluate whole steps" in line for line in caplog.messages)
    assert told == (
        order == "before"
    )  # behind, the host's node finds no device left and does nothing


@pytest.mark.parametrize("order", ["before", "behind"])
def test_the_split_goes_on_below_one_rank(split, order, monkeypatch):
    """ParaStep on one device leaves out steps, the host's split works in those that run."""
    import comfy.samplers

    from parastep.comfy.node import of_model, patch

    counted = Mock(wraps=comfy.samplers._calc_cond_batch_multigpu)
    monkeypatch.setattr(comfy.samplers, "_calc_cond_batch_multigpu", counted)
    model, given = build("flow"), {"scheduler": "simple", "steps": 30}
    own = sample(model, "flow", **given)
    if order == "before":
        ours = patch(split(model), ["cpu"])
    else:
        ours = split(patch(model, ["cpu"]))
    found, report = sample(ours, "flow", **given), of_model(ours).report
    assert report.fallback is None and report.ranks == 1
    assert counted.call_count == report.rounds < 30
    assert (found - own).norm() < 0.05 * own.norm()
