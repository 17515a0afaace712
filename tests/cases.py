"""Hypothesis strategies: whole cases, cuts, paddings; odd sizes on purpose."""

from hypothesis import strategies as st

from oracle import MAPS, MIXINGS, SCORES, Case

_SIZES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 33, 64, 65)


@st.composite
def cases(draw, scores=SCORES, maps=MAPS, mixings=MIXINGS, min_T=1, max_T=48, sparse=None, **fixed):
    """A case of at most max_T tokens; long ones are drawn more often, so that most cases fold."""
    chunk = draw(st.sampled_from((1, 2, 3, 4, 5, 8)))
    window = chunk * draw(st.integers(1, 3))
    Hkv = draw(st.integers(1, 2))
    T = draw(st.sampled_from([*range(min_T, max_T + 1), *range(max(min_T, 3 * max_T // 4), max_T + 1)] * 2))
    if sparse is None:
        sparse = draw(st.sampled_from((5, 3, 1, 0, 2, 8, 12, T)))
    drawn = dict(
        B=draw(st.integers(1, 3)), T=T, Hkv=Hkv, Hq=Hkv * draw(st.integers(1, 3)),
        D=draw(st.sampled_from(_SIZES)), Dv=draw(st.sampled_from(_SIZES)), F=2 * draw(st.sampled_from(_SIZES)),
        window=window, chunk=chunk, sparse=sparse,
        mixing=draw(st.sampled_from(mixings)), score=draw(st.sampled_from(scores)), map=draw(st.sampled_from(maps)),
        sparse_per=draw(st.sampled_from(("query_head", "kv_head"))), seed=draw(st.integers(0, 99)),
        scale=draw(st.sampled_from((None, None, 0.25))))
    return Case(**{**drawn, **fixed})


def cuts(T):
    """Where to cut T tokens into calls."""
    return st.one_of(st.just(list(range(T))), st.lists(st.integers(0, T), max_size=6))
