"""The TensorRT engine through any order of events: sequences come, share, grow, denoise in changing company, and go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec, Manifest
from dgemma_runtime.errors import EngineMemoryError

if TYPE_CHECKING:
    from tests.engines.conftest import Harness, Sequence

Make = Callable[..., "Harness"]
LIMITS = (3, 24, 4, 260, 60)  # pages for three sequences of MOST tokens that share none
MOST = 310
LAYERS = (LayerSpec(SLIDING, 1, 24), LayerSpec(FULL, 1, 16), LayerSpec(FULL, 2, 8), LayerSpec(FULL, 1, 16))


@dataclass
class Life:
    """Draws events and has them happen; where memory is short, a call that finds none is let go."""

    harness: Harness
    data: st.DataObject
    live: dict[int, Sequence] = field(default_factory=dict)

    def happen(self) -> None:
        kind = self.data.draw(st.sampled_from(["start", "share", "encode", "denoise", "denoise", "leave", "end"]))
        chosen = {slot: one for slot, one in self.live.items() if self.data.draw(st.booleans())}
        free = [slot for slot in range(3) if slot not in self.live]
        if kind == "start" and free:
            self.live[free[0]] = self.harness.prefilled(self.data.draw(st.integers(1, 200)))
        elif kind == "share" and free and chosen:
            self.share(free[0], next(iter(chosen.values())))
        elif kind == "encode":
            ready = [one for one in chosen.values() if one.slot is None and one.length < MOST]
            self.harness.encode(ready, [self.data.draw(st.integers(1, 24)) for _ in ready])
        elif kind == "denoise":
            self.denoise(chosen)
        elif kind == "leave":
            for one in chosen.values():
                if one.slot is not None:
                    self.harness.leave(one)
        elif kind == "end":
            for slot in chosen:
                self.harness.end(self.live.pop(slot))

    def share(self, slot: int, other: Sequence) -> None:
        size = self.harness.engine.limits.page_size
        tokens = other.length // size * size
        window = other.table.view.sliding[max(0, tokens - self.harness.spec.sliding_window + 1) // size :]
        if (window >= 0).all():
            self.live[slot] = self.harness.sharing(other, tokens)
            self.harness.encode([self.live[slot]], [self.data.draw(st.integers(1, 24))])

    def denoise(self, chosen: dict[int, Sequence]) -> None:
        ended = {
            slot: one
            for slot, one in chosen.items()
            if one.soft is not None and one.length < MOST and self.data.draw(st.booleans())
        }
        self.harness.denoise({slot: one for slot, one in chosen.items() if slot not in ended}, ended)
        for one in ended.values():
            self.harness.check_pages(one)


def life(make: Make, manifest: Manifest, data: st.DataObject, memory_bytes: int = 2**40) -> Life:
    return Life(make(limits=LIMITS, manifest=manifest, memory_bytes=memory_bytes, slot_group=data.draw(GROUPS)), data)


GROUPS = st.sampled_from([1, 64])
SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@SETTINGS
@given(data=st.data())
def test_with_memory_enough(
    make: Make, manifest: Manifest, least_memory: Callable[[Manifest, tuple[int, ...]], int], data: st.DataObject
) -> None:
    """As much as an engine wants to see when it opens is enough for whatever follows."""
    model = replace(manifest.model, layers=data.draw(st.sampled_from([manifest.model.layers, LAYERS])))
    manifest = replace(manifest, model=model, kv_dtype=data.draw(st.sampled_from(["bf16", "fp8"])))
    memory_bytes = data.draw(st.sampled_from([2**40, 0])) or least_memory(manifest, LIMITS)
    one = life(make, manifest, data, memory_bytes)
    for _ in range(data.draw(st.integers(1, 25))):
        one.happen()
    one.harness.close()


@SETTINGS
@given(data=st.data())
def test_where_memory_comes_and_goes(make: Make, manifest: Manifest, data: st.DataObject) -> None:
    """A call that finds none changes nothing, whatever it was."""
    one = life(make, manifest, data)
    device = one.harness.device
    for _ in range(data.draw(st.integers(5, 25))):
        if data.draw(st.booleans()):
            device.memory_bytes = device.allocated_bytes + 500 * data.draw(st.integers(-300, 300))
        try:
            one.happen()
        except EngineMemoryError:
            device.memory_bytes = 2**40
    one.harness.close()
