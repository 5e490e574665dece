"""A whole plan: counts, the best layout with its memory and time, price and energy, and what decoding could reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cadre.errors import UsageError
from cadre.plan.count import Count, count
from cadre.plan.decode import CACHE_BYTES, serving
from cadre.plan.hardware import LINK_EFFICIENCY, LINK_EFFICIENCY_SOURCE, Device
from cadre.plan.layout import Degrees, Layout, Workload
from cadre.plan.memory import OPTIMIZERS, RESERVE, Memory
from cadre.plan.search import Prediction, activations, fits, search, smallest
from cadre.plan.shape import Shape

# DeepSeek-V3's largest batch, 15,360 sequences of 4,096 tokens (arXiv 2412.19437, section 4.2): the default is no larger.
_LARGEST_BATCH_TOKENS = 15360 * 4096
_SEQUENCES_A_DEVICE = 8
_MOST_DEVICES = 1 << 17
# Seconds below which a step on a card waits for the launches of its kernels, some thousand of them.
_LAUNCHES = 0.02
# What is beyond any plan, and so a slip of the pen.
_MOST = {"batch": 10**9, "context": 10**9, "tokens": 1e18, "rent": 1e6, "parameters": 10**18}

EXCLUDED = (
    "failures and restarts, evaluation, data preparation, research runs",
    "hosts, network and cooling in the energy: devices at full power only",
    "experts out of balance, slow steps, latency of links",
)


@dataclass(frozen=True)
class Request:
    """What to plan. None leaves a choice to the planner: devices, the fewest that training fits on; batch, sequences a step;
    tokens, no cost; mfu, what the layout model predicts; rent, the catalogue's; degrees, any layout, not `cadre train`'s.
    mtp_share: of the sequences, those that train multi-token prediction."""

    name: str
    source: str
    shape: Shape
    device: Device
    context: int
    devices: int | None = None
    precision: str | None = None
    batch: int | None = None
    micro_batch: int | None = None
    optimizer: str = "adamw"
    tokens: float | None = None
    mfu: float | None = None
    rent: float | None = None
    degrees: Degrees | None = None
    mtp_share: float = 1.0
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_plan(request: Request) -> dict[str, Any]:
    """The plan as plain values, ready for JSON; `docs/plan.md` says what each key means.

    Raises `UsageError` for a precision the device has no rate for, and for numbers out of their range.
    """
    check(request)
    precision = _precision(request)
    device, shape = request.device, request.shape
    counted = counts(request, precision)
    devices = request.devices or _enough(request, precision) or _MOST_DEVICES
    work = _work(request, precision, devices)
    found = search(work, devices)
    notes = list(request.notes)
    reach = shape.max_position_embeddings
    if reach is not None and request.context > reach:
        notes.append(f"context {request.context:,} is beyond the {reach:,} positions the model is made for")
    if found and not device.cpu and found[0].seconds < _LAUNCHES:
        least = f"{_LAUNCHES * 1e3:.0f} ms"
        notes.append(f"a step of less than {least}: what launching its kernels takes is not counted, and may be longer")
    leanest = None if found else smallest(work, devices)
    if not found:
        notes.append(_why_not(request, work, devices, leanest))
    chosen = found[0] if found else leanest
    speed, mfu = _speed(request, counted, precision, devices, found)
    # A given MFU is the whole step's: every term takes its share of it.
    pace = work.batch * work.context / (speed * found[0].seconds) if found and speed else 1.0
    return {
        "model": request.name,
        "model_type": shape.model_type,
        "source": request.source,
        "context": request.context,
        **_counts(counted),
        "max_position_embeddings": shape.max_position_embeddings,
        "hardware": device.name,
        "devices": devices,
        "precision": precision,
        "batch": work.batch,
        "fits": bool(found),
        "layout": _layout(found[0].layout) if found else None,
        "idle_devices": devices - found[0].layout.devices if found else 0,
        "memory_per_device_bytes": _memory(chosen, work) if chosen else None,
        "step_seconds": found[0].seconds * pace if found else None,
        "step_terms_seconds": _times(found[0].terms, pace) if found else None,
        "step_hidden_seconds": _times(found[0].hidden, pace) if found else None,
        "layouts": [
            {
                **_layout(p.layout),
                "step_seconds": p.seconds * pace,
                "memory_bytes": p.memory.total,
                "terms": _times(p.terms, pace),
            }
            for p in found
        ],
        "mfu": mfu,
        "tokens_per_second": speed,
        "tokens": request.tokens,
        **_cost(request, devices, speed),
        "decode": _decode(shape, device, devices, precision, request.context),
        "assumptions": _assumptions(request, precision, devices, work, mfu),
        "excluded": list(EXCLUDED),
        "ignored": list(request.ignored),
        "notes": notes,
    }


def counts(request: Request, precision: str) -> Count:
    """The model's counts as the run would have them: multi-token prediction by its share, caches in the precision."""
    return count(request.shape, context=request.context, cache_bytes=CACHE_BYTES[precision]).trained(request.mtp_share)


def _times(seconds: dict[str, float], pace: float) -> dict[str, float]:
    return {name: value * pace for name, value in seconds.items()}


def check(request: Request) -> None:
    """Every number in its range, and a known optimizer. Raises `UsageError`."""
    for name in ("devices", "batch", "context", "tokens"):
        value = getattr(request, name)
        if value is not None and not 1 <= value < float("inf"):
            raise UsageError(f"--{name} is {value:g}; it must be at least 1")
        if value is not None and value > _MOST.get(name, value):
            raise UsageError(f"--{name} is {value:g}; at most {_MOST[name]:,.0f} can be planned for")
    if request.devices is not None and request.devices > _MOST_DEVICES:
        raise UsageError(f"--devices is {request.devices}; at most {_MOST_DEVICES:,} can be planned for")
    if request.mfu is not None and not 0 < request.mfu <= 1:
        raise UsageError(f"--mfu is {request.mfu:g}; it must be above 0 and at most 1, such as 0.4")
    if request.rent is not None and not 0 <= request.rent <= _MOST["rent"]:
        most = f"{_MOST['rent']:,.0f}"
        raise UsageError(f"--rent is {request.rent:g}; it must be US dollars a device-hour, at least 0 and at most {most}")
    if (parameters := count(request.shape).total_parameters) > _MOST["parameters"]:
        raise UsageError(f"{request.source}: {parameters:.3g} parameters; at most {_MOST['parameters']:.0e} can be planned for")
    if request.optimizer not in OPTIMIZERS:
        raise UsageError(f"--optimizer {request.optimizer}: must be one of {', '.join(OPTIMIZERS)}")


def exceeds(request: Request, devices: int) -> bool:
    """Whether training takes more memory than so many devices have, in the leanest layout that there is on them."""
    leanest = smallest(_work(request, _precision(request), devices), devices)
    return leanest is not None and leanest.memory.total > request.device.memory_bytes


def _precision(request: Request) -> str:
    """The precision asked for, or the device's first."""
    rates = request.device.flops
    precision = request.precision or next(iter(rates))
    if precision not in rates:
        raise UsageError(f"--precision {precision}: {request.device.name} has a rate for {', '.join(rates)} only")
    return precision


def _work(request: Request, precision: str, devices: int) -> Workload:
    batch = request.batch
    if batch is None:
        batch = max(1, min(_SEQUENCES_A_DEVICE * devices, _LARGEST_BATCH_TOKENS // request.context))
    micro = min(request.micro_batch, batch) if request.micro_batch else None
    return Workload(
        request.shape, request.device, precision, request.context, batch, request.optimizer, micro, request.degrees,
        request.mtp_share,
    )  # fmt: skip


def _enough(request: Request, precision: str) -> int | None:
    """The fewest devices, of the powers of two, on which training fits; None if it does on none."""
    powers = (2**power for power in range(_MOST_DEVICES.bit_length()))
    return next((devices for devices in powers if fits(_work(request, precision, devices), devices)), None)


def _why_not(request: Request, work: Workload, devices: int, leanest: Prediction | None) -> str:
    room = f"{work.device.memory_bytes / 1e9:.0f} GB"
    if leanest is None and request.devices is None:
        return (f"training at a context of {work.context:,} fits on no number of {work.device.name}, with the {work.batch} "
                "sequences a step that the default allows")  # fmt: skip
    if leanest is None:
        if request.degrees is not None:
            return f"this recipe cannot be spread over {devices} devices: see batch, micro_batch and [parallel]"
        return f"no layout gives each of {devices} devices work: a batch of {work.batch} sequences is too small"
    need = f"the leanest layout needs {leanest.memory.total / 1e9:,.1f} GB a device of {room}"
    if request.devices is None:
        return f"training fits on no number of {work.device.name}: {need}"
    enough = _enough(request, work.precision)
    more = "nor on any other number of them" if enough is None else f"{enough:,} are enough"
    return f"training does not fit on {devices} {work.device.name}: {need}; {more}"


def _speed(
    request: Request, counted: Count, precision: str, devices: int, found: list[Prediction]
) -> tuple[float | None, float | None]:  # fmt: skip
    """Training tokens a second over all devices, and the share of their peak that this is. None where there is no layout to
    predict from and no share is given: what the devices reach while computing is several times what a run does."""
    peak = request.device.flops[precision] * devices
    if request.mfu is not None:
        return request.mfu * peak / counted.training_flops_per_token, request.mfu
    if not found:
        return None, None
    speed = found[0].tokens_per_second
    return speed, speed * counted.training_flops_per_token / peak


def _counts(counted: Count) -> dict[str, Any]:
    values = counted.as_dict()
    del values["context"]
    extra = counted.parts["multi_token_prediction"]
    values["total_parameters_without_multi_token_prediction"] = counted.total_parameters - extra
    values["parameters"] = values.pop("parts")
    return values


def _layout(layout: Layout) -> dict[str, Any]:
    return {**asdict(layout), "devices": layout.devices}


def _memory(chosen: Prediction, work: Workload) -> dict[str, float]:
    """The chosen layout's memory by part, and what its activations would be under each recomputation."""
    held: Memory = chosen.memory
    other = activations(work, chosen.layout)
    return {**asdict(held), "total": held.total, "capacity": work.device.memory_bytes, **other}


def _cost(request: Request, devices: int, speed: float | None) -> dict[str, float | None]:
    rent = request.device.rent if request.rent is None else request.rent
    if request.tokens is None or speed is None:
        return dict.fromkeys(("device_hours", "days", "cost_usd", "energy_kwh"))
    hours = request.tokens / speed / 3600 * devices
    energy = hours * request.device.watts / 1000
    return {"device_hours": hours, "days": hours / devices / 24, "cost_usd": hours * rent, "energy_kwh": energy}


def _decode(shape: Shape, device: Device, devices: int, precision: str, context: int) -> dict[str, Any] | None:
    made = serving(shape, device, devices, precision, context)
    if made is None:
        return None
    return {
        "context": context,
        "devices_per_copy": made.group,
        "devices_per_set_of_weights": made.tensor,
        "copies": made.copies,
        "users": made.users * made.copies,
        "users_per_copy": made.users,
        "tokens_per_second": made.best.tokens_per_second * made.copies,
        "tokens_per_second_per_user": 1 / made.best.seconds,
        "weight_bytes": made.weight_bytes,
        "cache_bytes_per_user": made.cache_bytes_per_user,
        "steps": [
            {**asdict(one), "seconds": one.seconds, "tokens_per_second": one.tokens_per_second,
             "tokens_per_second_per_user": 1 / one.seconds, "bound": _bound(one.memory, one.compute, one.links)}
            for one in made.steps
        ],
    }  # fmt: skip


def _bound(memory: float, compute: float, links: float) -> str:
    return max((memory, "memory"), (compute, "compute"), (links, "links"))[1]


def _assumptions(request: Request, precision: str, devices: int, work: Workload, mfu: float | None) -> list[dict[str, Any]]:
    device, found = request.device, []

    def say(name: str, value: Any, source: str, option: str | None = None) -> None:
        found.append({"name": name, "value": value, "source": source, "option": option})

    own = "given"
    say("peak FLOP/s", device.flops[precision], device.sources["flops"], "--hardware, --precision")
    say("memory bytes", device.memory_bytes, device.sources["memory"], "--hardware")
    say("memory bytes/s", device.memory_bandwidth, device.sources["memory"], "--hardware")
    if devices > 1:
        say("node link bytes/s", device.link_bandwidth, device.sources["links"], "--hardware")
        say("network bytes/s", device.network_bandwidth, device.sources["links"], "--hardware")
        say("share of a link's rate reached", LINK_EFFICIENCY, LINK_EFFICIENCY_SOURCE)
    say("share of peak while computing", device.efficiency[precision], device.sources["efficiency"], "--mfu")
    if request.shape.sparse_blocks:
        what = "expert width at which it halves"
        say(what, device.half_rate_width, device.sources.get("experts", device.sources["efficiency"]), "--mfu")
    if mfu is not None:
        say("MFU", mfu, own if request.mfu is not None else "predicted by the layout model", "--mfu")
    say("USD a device-hour", device.rent if request.rent is None else request.rent,
        own if request.rent is not None else device.sources["rent"], "--rent")  # fmt: skip
    say("watts a device", device.watts, device.sources["watts"], "--hardware")
    rule = f"{_SEQUENCES_A_DEVICE} a device, at most DeepSeek-V3's 62.9M tokens (arXiv 2412.19437, section 4.2)"
    say("sequences a step", work.batch, own if request.batch is not None else rule, "--batch")
    optimizer = (
        "bytes of state and float32 master: 12 a parameter for adamw, 8 with bf16 moments, 8 for the matrices that muon steps"
    )
    say("optimizer", request.optimizer, optimizer, "--optimizer")
    say("memory kept free", RESERVE, "assumption: runtime context, communication buffers, fragmentation")
    return found
