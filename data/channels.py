"""Which volumes are the channels of one sample: contrasts of one session of a subject."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .sources import LeftOut, Source


def channel_number(channels: Sequence[str], modality: str | None) -> int | None:
    """The place of a modality among the channels; None if it is none of them. Capitals do not matter."""
    names = [name.lower() for name in channels]
    return names.index(modality.lower()) if modality and modality.lower() in names else None


def group_channels(sources: Sequence[Source], channels: Sequence[str]) -> tuple[list[tuple[Source, ...]], LeftOut]:
    """What is prepared together: each volume alone, or with `channels` those of one subject's session.

    Returns:
        The groups, of which some may lack a channel; and what belongs to none, with the reason.

    Raises:
        ValueError: if there is no volume of one of the channels.
    """
    if not channels:
        return [(source,) for source in sources], []
    groups, left_out = grouped(sources, channels)
    check_channels((source.modality for group in groups for source in group), channels, sources)
    return groups, left_out


def check_channels(found: Iterable[str | None], channels: Sequence[str], there: Sequence[Source] = ()) -> None:
    """Raise ValueError unless each channel is among the modalities that were found."""
    numbers = {channel_number(channels, modality) for modality in found}
    if absent := [name for number, name in enumerate(channels) if number not in numbers]:
        counts = Counter(source.modality or "unknown" for source in there if source.subject).most_common(9)
        words = ", ".join(f"{name} ({count})" for name, count in counts) or "none whose subject and modality are known"
        raise ValueError(
            f"data.channels: no volume is {' or '.join(absent)}; there are {words}. Name those there, or [] for "
            "each volume alone"
        )


def grouped(sources: Sequence[Source], channels: Sequence[str]) -> tuple[list[tuple[Source, ...]], LeftOut]:
    """The same, of a part of the data."""
    groups: dict[tuple[str, str, str], dict[int, Source]] = {}
    left_out: LeftOut = []
    for source in sources:
        number = channel_number(channels, source.modality)
        if number is None:
            left_out.append((source.path, "its modality is not one of data.channels"))
        elif not source.subject:
            left_out.append((source.path, "no subject is known, by whom data.channels are put together"))
        elif number in (group := groups.setdefault(source[1:4], {})):
            left_out.append((source.path, f"a second one of its modality, beside {group[number].path}"))
        else:
            group[number] = source
    return [tuple(group[number] for number in sorted(group)) for group in groups.values()], left_out
