"""The figures of an estimate as a person reads them: in files their keys end in their units."""

from display import engineering, prefixed

from .estimate import GAINED, SPENT

QUANTITIES = {  # key: (what it is, its unit, one of the key's unit in that unit)
    "energy_pj": ("energy", "J", 1e-12),
    "delay_ns": ("delay", "s", 1e-9),
    "area_um2": ("area", "m²", 1e-12),
    "edap_pj_ns_um2": ("EDAP", "J·ms·mm²", 1e-24),  # as in millijoules, milliseconds, mm²
    "ops": ("operations", "", 1.0),
    "tops_per_watt": ("energy efficiency", "OPS/W", 1e12),
    "tops_per_mm2": ("area efficiency", "OPS/mm²", 1e12),
}
RATIOS = {key: name for name, key in SPENT.items()} | {name: name for name in GAINED}
RATIO_NAMES = {
    **{"edap": "EDAP", "energy": "energy", "delay": "delay", "area": "area"},
    **{"tops_per_watt": "TOPS/W", "tops_per_mm2": "TOPS/mm²"},
}


def shown(key: str, value: float, digits: int = 4) -> str:
    """A figure with the unit a person would choose: "11.18 µJ" for "energy_pj" and 11179416."""
    _, unit, one = QUANTITIES[key]
    return engineering(value * one, unit, digits)


def unit_of(key: str, value: float) -> tuple[float, str]:
    """(what to divide figures of this kind by, the unit they then have) for an axis whose largest
    one is `value`."""
    _, unit, one = QUANTITIES[key]
    size, name = prefixed(value * one, unit)
    return size / one, name
