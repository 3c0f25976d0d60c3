"""What batches announce of the units that later ones need."""

from types import SimpleNamespace

from vlmo.datamodules.read_ahead import AnnouncedBatches

DATASET = SimpleNamespace(units=lambda numbers: sorted({(0, 0, int(number) // 10) for number in numbers}))


def announced(samples, ahead, size=2):
    """(samples, their units, the units announced) of each batch."""
    batches = [[(sample, 0) for sample in samples[start : start + size]] for start in range(0, len(samples), size)]
    found = list(AnnouncedBatches(batches, DATASET, ahead))
    assert [batch.keys for batch in found] == batches
    return [([key for key, _ in batch.keys], [unit for _, _, unit in batch.units]) for batch in found]


def test_each_unit_is_announced_once_before_it_is_needed():
    samples = list(range(100))
    found = announced(samples, ahead=20)
    assert [unit for _, units in found for unit in units] == list(range(10))
    for place, (keys, _) in enumerate(found):
        wanted = {key // 10 for key in samples[: keys[-1] + 1 + 20]}
        assert wanted <= {unit for _, units in found[: place + 1] for unit in units}


def test_a_unit_that_is_needed_again_much_later_is_announced_again():
    samples = [*range(10), *range(20, 60), *range(10)]
    told = [unit for _, units in announced(samples, ahead=10) for unit in units]
    assert told == [0, 2, 3, 4, 5, 0]
    assert [unit for _, units in announced(samples, ahead=60) for unit in units] == [0, 2, 3, 4, 5]
