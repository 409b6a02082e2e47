"""When a thread turns AMX's tile unit on and off."""

from quant.kernels.jit import inner
from quant.kernels.packed_tiles import uses_tiles
from quant.kernels.tile_instructions import HAS_TILES, configure_tiles, release_tiles


@inner
def _switch(on):  # type: ignore[no-untyped-def]
    if on:
        configure_tiles()
    else:
        release_tiles()


@inner
def _do_nothing(on):  # type: ignore[no-untyped-def]
    pass


_switch_where_there_is_one = _switch if HAS_TILES else _do_nothing


@inner
def use_tile_unit(granted, tokens, on):  # type: ignore[no-untyped-def]
    """Before (on) and after a thread multiplies up to `tokens` tokens at a time. An idle thread keeps no tiles."""
    if uses_tiles(granted, tokens):
        _switch_where_there_is_one(on)
