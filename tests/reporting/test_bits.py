import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import params_of, write_run

from stages.common.params import load_params
from stages.reporting.bits import LEARNED, allocations_of, average_bits, bits_by_layer, duels_of, objectives_of
from stages.reporting.claims import assess, read_claims
from stages.reporting.inputs import Run, read_run
from stages.reporting.page import render_page
from stages.reporting.plots import draw_all
from stages.reporting.rows import assemble_groups, assemble_rows, choose

SEARCH = {"average_bits": 4.0, "evaluations": 100}
QUANTIZERS = {
    "uniform_4": {"method": "uniform_bits", "bits": 4},
    "uniform_3": {"method": "uniform_bits", "bits": 3},
    "random_4": SEARCH | {"method": "searched_bits", "search": "random"},
    "greedy_4": SEARCH | {"method": "searched_bits", "search": "greedy"},
    "programme_4": SEARCH | {"method": "searched_bits", "search": "integer_programme"},
    "learned_4": SEARCH | {"method": "learned_bits"},
    "learned_recovered": SEARCH | {"method": "learned_bits", "epochs": 2},
}
LAYERS = {"stem": 8, "middle": 3, "head": 5}


def search_of(quantizer: str, seed: int) -> dict:
    tried = [1.0] if quantizer in ("greedy_4", "programme_4") else [2.0 - 0.01 * i + 0.1 * seed for i in range(90)]
    return {"best": min(tried), "tried": tried, "evaluations": 100, "weights": 1000, "used_bits": 3990}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two seeds of one network, every quantizer on the dense one."""
    folder = tmp_path_factory.mktemp("bits")
    params = params_of(seeds=2, pruners={"none": {"method": "none"}}, variants=[("none", "fp32")])
    params["quantize"] |= QUANTIZERS
    for model in params["models"]:
        for quantizer in QUANTIZERS:
            params["variants"][f"{model}-none-{quantizer}"] = {"pruning": f"{model}-none", "quantizer": quantizer}
    write_run(folder, params)
    for variant, entry in params["variants"].items():
        path = folder / "reports/profile" / variant / "model.json"
        description = json.loads(path.read_text())
        if "bits" in QUANTIZERS.get(entry["quantizer"], {}).get("method", ""):
            description["layers"] = {name: {"weight_bits": bits} for name, bits in LAYERS.items()}
        if entry["quantizer"].split("_")[0] in ("random", "greedy", "programme", "learned"):
            description["search"] = search_of(entry["quantizer"], int("-s1-" in variant))
        path.write_text(json.dumps(description))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return read_run(load_params())


def test_allocations_are_all_ways_to_spend_a_budget_that_was_searched(run: Run):
    found = allocations_of(run, assemble_groups(run))
    assert [one.search for one in found] == ["uniform", "random", "greedy", "integer programme", LEARNED, LEARNED]
    assert len({one.contest for one in found}) == 2  # recovery makes another contest
    assert {one.average_bits for one in found} == {4.0, 3.99}
    random = found[1]
    assert random.objective == pytest.approx(np.mean([1.11, 1.21]))
    assert random.objective_deviation == pytest.approx(np.std([1.11, 1.21], ddof=1))


def test_the_learned_bits_meet_every_competitor_on_the_same_images(run: Run):
    duels = duels_of(run, allocations_of(run, assemble_groups(run)))
    assert [(one.learned, one.other) for one in duels] == [
        ("atto-none-learned_4", f"atto-none-{other}_4") for other in ("uniform", "random", "greedy", "programme")
    ]
    expected = np.mean(
        [
            run.variants[f"atto{seed}-none-learned_4"].correct.mean()
            - run.variants[f"atto{seed}-none-greedy_4"].correct.mean()
            for seed in ("", "-s1")
        ]
    )
    assert duels[2].difference.delta == pytest.approx(expected)
    assert duels[2].p_value >= duels[2].difference.p_value


def test_bits_and_their_average_are_those_of_the_artifact(run: Run):
    assert bits_by_layer(run, "atto-none-learned_4") == LAYERS
    assert average_bits(run, "atto-none-learned_4") == 3.99
    assert average_bits(run, "atto-none-uniform_3") == 3


def test_what_was_tried_is_told_by_seed(run: Run):
    by_name = {one.group.name: one for one in allocations_of(run, assemble_groups(run))}
    assert objectives_of(run, by_name["atto-none-learned_4"]).shape == (2, 90)
    assert objectives_of(run, by_name["atto-none-greedy_4"]) is None


def test_the_page_shows_searches_duels_and_both_pictures(run: Run):
    groups = assemble_groups(run)
    rows, choices = assemble_rows(run, groups), choose(run)
    pictures = draw_all(run, rows, groups, choices)
    page = render_page(run, rows, groups, choices, assess(read_claims(), run, rows, groups), pictures)
    assert "Bits of each layer</h2>" in page
    assert "The learned bits against the others</h3>" in page
    assert "1.1600 \N{PLUS-MINUS SIGN} 0.0707" in page
    assert {"bits", "searches"} <= pictures.keys()
    assert "policy gradient: 8, 3, 5" in pictures["bits"].alt
    assert "policy gradient: from" in pictures["searches"].alt


def test_without_a_search_there_is_no_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params())
    groups = assemble_groups(run)
    assert allocations_of(run, groups) == []
    assert "bits" not in draw_all(run, assemble_rows(run, groups), groups, choose(run))
