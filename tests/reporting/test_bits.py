import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import params_of, write_run

from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.bits import (
    LEARNED,
    UNTRAINED,
    Duel,
    average_bits,
    bits_by_layer,
    contests_of,
    duels_of,
    objectives_of,
    unpaired_of,
)
from stages.reporting.cards import card
from stages.reporting.claims import assess, read_claims
from stages.reporting.inputs import Run, read_run
from stages.reporting.page import render_page
from stages.reporting.plots import Picture, draw_all, searches
from stages.reporting.rows import Group, assemble_groups, assemble_rows, choose

SEARCH = {"average_bits": 4.0, "evaluations": 100}
RECOVERY = {"epochs": 2, "learning_rate_factor": 0.2}
QUANTIZERS = {
    "uniform_4": {"method": "uniform_bits", "bits": 4},
    "uniform_3": {"method": "uniform_bits", "bits": 3},
    "random_4": SEARCH | {"method": "searched_bits", "search": "random"},
    "greedy_4": SEARCH | {"method": "searched_bits", "search": "greedy"},
    "ilp_4": SEARCH | {"method": "searched_bits", "search": "ilp"},
    "untrained_4": SEARCH | {"method": "learned_bits"},
    "learned-4": SEARCH | {"method": "learned_bits"},  # a name may hold a dash
    "uniform_recovered": RECOVERY | {"method": "uniform_bits", "bits": 4},
    "learned_recovered": SEARCH | RECOVERY | {"method": "learned_bits"},
}
LAYERS = {"stem": 8, "middle": 3, "head": 5}
KEPT = ["embedding", "gate"]
LEARNED_4 = "atto-none-learned-4"


def search_of(seed: int) -> dict:
    tried = [2.0 - 0.01 * i + 0.1 * seed for i in range(90)]
    return {"best": min(tried), "tried": tried, "evaluations": 100, "weights": 1000, "used_bits": 3990}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three seeds of one network, every quantizer on the dense one; nothing changes it, so all tests share it."""
    folder = tmp_path_factory.mktemp("bits")
    params = params_of(seeds=3, pruners={"none": {"method": "none"}}, variants=[("none", "fp32")])
    params["quantizers"] |= QUANTIZERS
    for model in params["models"]:
        for quantizer in QUANTIZERS:
            params["variants"][f"{model}-none-{quantizer}"] = {"pruned": f"{model}-none", "quantizer": quantizer}
    write_run(folder, params)
    for variant, entry in params["variants"].items():
        path = folder / "reports/profile" / variant / "model.json"
        description = json.loads(path.read_text())
        method = QUANTIZERS.get(entry["quantizer"], {}).get("method")
        if method:
            description["layers"] = {name: {"weight_bits": bits} for name, bits in LAYERS.items()}
            description["float_layers"] = KEPT
        if method in ("searched_bits", "learned_bits"):
            description["search"] = search_of(params["models"][variant.split("-none-")[0]]["seed"])
        path.write_text(json.dumps(description))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return changed(read_run(load_params(Params)), "untrained_4", learning_rate=0.0)


def changed(run: Run, quantizer: str, **settings) -> Run:
    """The run with other settings of one quantizer, whether params.yaml would allow them or not."""
    quantize = run.params.quantizers | {quantizer: run.params.quantizers[quantizer].model_copy(update=settings)}
    return replace(run, params=run.params.model_copy(update={"quantizers": quantize}))


def right_but_for(run: Run, wrong: dict[str, int]) -> Run:
    """The run where all test images are classified correctly but the first so many of each variant named."""
    images = np.arange(len(run.labels))
    return replace(
        run, variants={v: replace(one, correct=images >= wrong.get(v, 0)) for v, one in run.variants.items()}
    )


def with_variants(groups: dict[str, Group], name: str, variants: list[str]) -> dict[str, Group]:
    return groups | {name: replace(groups[name], variants=variants)}


def contests_by_search(run: Run) -> list[list[str]]:
    return [[one.search for one in contest.allocations] for contest in contests_of(run, assemble_groups(run))]


def duels_by_other(run: Run, groups: dict[str, Group]) -> dict[str, Duel]:
    return {duel.other: duel for duel in duels_of(run, contests_of(run, groups)) if duel.learned == LEARNED_4}


def page_of(run: Run, groups: dict[str, Group] | None = None, pictures: dict[str, Picture] | None = None) -> str:
    """The page, without pictures where none are given: they take seconds to draw."""
    groups = groups or assemble_groups(run)
    rows = assemble_rows(run, groups)
    return render_page(run, rows, groups, choose(run), assess(read_claims(), run, rows, groups), pictures or {})


def test_a_contest_is_all_ways_to_spend_a_budget_that_was_searched(run: Run):
    recovery, plain = ["uniform", LEARNED], ["uniform", "random", "greedy", "integer programme", UNTRAINED, LEARNED]
    contests = contests_of(run, assemble_groups(run))
    assert contests_by_search(run) == [plain, recovery]
    assert [contest.title for contest in contests] == [
        "4 bits on average, 0 epochs of recovery",
        "4 bits on average, 2 epochs of recovery",
    ]
    found = contests[0].allocations
    assert {one.average_bits for one in found} == {4.0, 3.99}
    assert found[1].objective == pytest.approx(np.mean([1.11, 1.21, 1.31]))
    assert found[1].objective_deviation == pytest.approx(np.std([1.11, 1.21, 1.31], ddof=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"calibration_images": 64},
        {"calibration_seed": 1},
        {"evaluations": 40},
        {"objective": "accuracy"},
        {"choices": [3, 4]},
        {"average_bits": 4.5},
        {"rounding": "gptq"},
        {"epochs": 1},
    ],
)
def test_searches_that_were_given_something_else_do_not_compete(run: Run, settings: dict):
    other = changed(run, "greedy_4", **settings)
    contests = [contest for contest in contests_by_search(other) if "greedy" in contest]
    alone = {"average_bits", "rounding", "epochs"} & settings.keys()  # a uniform allocation has these settings too
    assert contests == [["greedy"] if alone else ["uniform", "greedy"]]
    assert "atto-none-greedy_4" not in duels_by_other(other, assemble_groups(other))


def test_a_search_with_more_of_everything_meets_the_uniform_bits_only(run: Run):
    run = changed(run, "learned-4", evaluations=2000, calibration_images=4096)
    run = changed(run, "greedy_4", evaluations=40, calibration_images=64, objective="accuracy", choices=[3, 4])
    groups = assemble_groups(run)
    assert list(duels_by_other(run, groups)) == ["atto-none-uniform_4"]
    titles = [contest.title for contest in contests_of(run, groups)]
    assert len(set(titles)) == len(titles) == 4
    assert any("4096 calibration images" in title and "2000 evaluations" in title for title in titles)
    assert any("choices [3, 4]" in title and "objective accuracy" in title for title in titles)


def test_uniform_bits_rounded_on_other_images_stand_apart(run: Run):
    for name in ("uniform_4", "random_4", "greedy_4", "ilp_4", "untrained_4", "learned-4"):
        run = changed(run, name, rounding="gptq", calibration_images=64)
    assert contests_by_search(run)[0][0] == "uniform"
    run = changed(run, "uniform_4", calibration_images=128)
    assert contests_by_search(run)[0][0] == "random"


def test_the_controllers_own_settings_are_what_competes(run: Run):
    run = changed(run, "untrained_4", learning_rate=0.5, samples=4, hidden_units=8, entropy_weight=0.0)
    groups = assemble_groups(run)
    (contest, _) = contests_of(run, groups)
    assert [one.search for one in contest.allocations].count(LEARNED) == 2
    duels = [(duel.learned, duel.other) for duel in duels_of(run, [contest])]
    assert ("atto-none-untrained_4", LEARNED_4) in duels
    assert (LEARNED_4, "atto-none-untrained_4") not in duels  # the same test, which would count twice
    picture = searches(run, contest)
    assert f"{LEARNED} ({LEARNED_4}): from" in picture.alt


def test_only_a_controller_that_learns_challenges_the_others(run: Run):
    duels = duels_of(run, contests_of(run, assemble_groups(run)))
    others = [("uniform", "uniform"), ("random", "random"), ("greedy", "greedy"), ("programme", "integer programme")]
    assert [(duel.learned, duel.other, duel.search) for duel in duels] == [
        *((LEARNED_4, f"atto-none-{name}_4", search) for name, search in others),
        (LEARNED_4, "atto-none-untrained_4", UNTRAINED),
        ("atto-none-learned_recovered", "atto-none-uniform_recovered", "uniform"),
    ]


def test_a_duel_has_its_spread_over_seeds_whatever_their_order(run: Run):
    wrong = {
        "atto-none-greedy_4": 8,
        "atto-s1-none-greedy_4": 20,
        "atto-none-learned-4": 4,
        "atto-s2-none-learned-4": 6,
    }
    run = right_but_for(run, wrong)
    groups = assemble_groups(run)
    differences = np.array([4, 20, -6]) / 400
    turned = with_variants(groups, "atto-none-greedy_4", groups["atto-none-greedy_4"].variants[::-1])
    for order in (groups, turned):
        duel = duels_by_other(run, order)["atto-none-greedy_4"]
        assert duel.difference.delta == pytest.approx(differences.mean())
        assert duel.deviation == pytest.approx(differences.std(ddof=1))
        assert duel.seeds == 3
    row = re.search(r"<tr><th scope=\"row\">atto-none-learned-4</th><td>atto-none-greedy_4</td>.*?</tr>", page_of(run))[
        0
    ]
    assert "<td>+1.50 \N{PLUS-MINUS SIGN} 3.28</td><td>3</td>" in row


@pytest.mark.parametrize("seeds", [slice(1), slice(1, 3)])
def test_without_the_same_networks_there_is_no_duel_and_the_page_says_so(run: Run, seeds: slice):
    groups = assemble_groups(run)
    greedy, learned = (groups[name].variants for name in ("atto-none-greedy_4", LEARNED_4))
    groups = with_variants(groups, "atto-none-greedy_4", greedy[seeds])
    groups = with_variants(groups, LEARNED_4, learned[:2])
    contests = contests_of(run, groups)
    assert "atto-none-greedy_4" not in duels_by_other(run, groups)
    (left_out,) = [one for one in unpaired_of(run, contests) if one.other == "atto-none-greedy_4"]
    assert left_out.learned_models == ["atto", "atto-s1"]
    assert left_out.other_models == ["atto", "atto-s1", "atto-s2"][seeds]
    models = ", ".join(left_out.other_models)
    assert f"{LEARNED_4} (on atto, atto-s1) against atto-none-greedy_4 (on {models})" in page_of(run, groups)


def test_p_values_are_corrected_over_all_duels(run: Run):
    models = ("atto", "atto-s1", "atto-s2")
    lost = {"uniform_4": 9, "random_4": 8, "greedy_4": 7, "ilp_4": 6, "untrained_4": 0, "uniform_recovered": 0}
    run = right_but_for(run, {f"{model}-none-{name}": images for name, images in lost.items() for model in models})
    groups = assemble_groups(run)
    for name, factor in {"uniform_4": 6, "random_4": 5, "greedy_4": 4, "ilp_4": 3}.items():
        duel = duels_by_other(run, groups)[f"atto-none-{name}"]
        assert duel.difference.p_value == pytest.approx(2 * 0.5 ** lost[name])  # all of an image's seeds turn together
        assert duel.p_value == pytest.approx(factor * 2 * 0.5 ** lost[name])  # Holm's, by hand


def test_bits_and_their_average_are_those_of_the_artifact(run: Run):
    assert bits_by_layer(run, LEARNED_4) == LAYERS
    assert average_bits(run, LEARNED_4) == 3.99
    assert average_bits(run, "atto-none-uniform_3") == 3


def test_what_was_tried_is_told_by_seed(run: Run):
    contest = contests_of(run, assemble_groups(run))[0]
    by_name = {one.group.name: one for one in contest.allocations}
    assert objectives_of(run, by_name[LEARNED_4]).shape == (3, 90)
    assert objectives_of(run, by_name["atto-none-uniform_4"]) is None


def test_the_page_shows_a_table_and_two_pictures_for_each_contest(run: Run):
    groups = assemble_groups(run)
    pictures = draw_all(run, assemble_rows(run, groups), groups, choose(run))
    page = page_of(run, groups, pictures)
    section = page[page.index('<h2 id="bits">') : page.index('<h2 id="claims">')]
    for words in (
        "<h3>4 bits on average, 0 epochs of recovery</h3>",
        "<h3>4 bits on average, 2 epochs of recovery</h3>",
        "The learned bits against the others</h3>",
        "1.2100 \N{PLUS-MINUS SIGN} 0.1000",
        "tries the even allocation first",
        "tells whether learning added anything",
    ):
        assert words in section
    assert {"bits_1", "bits_2", "searches_1", "searches_2"} <= pictures.keys()
    for number, epochs in ((1, 0), (2, 2)):
        for name in (f"bits_{number}", f"searches_{number}"):
            assert f"4 bits on average, {epochs} epochs of recovery" in pictures[name].title
            assert pictures[name].svg in section
    assert f"{LEARNED}: 8, 3, 5" in pictures["bits_1"].alt
    for search in ("random", "greedy", "integer programme", UNTRAINED, LEARNED):
        assert f"{search}: from" in pictures["searches_1"].alt


def test_nothing_is_said_of_an_untrained_policy_that_was_not_run(run: Run):
    assert "whether learning added anything" not in page_of(changed(run, "untrained_4", evaluations=99))


def test_layers_left_in_float_are_named_in_card_and_page(run: Run):
    groups = assemble_groups(run)
    cards = {row["variant"]: card(run, row, groups) for row in assemble_rows(run, groups)}
    for variant, text in cards.items():
        assert ("| layers left in float | 2: embedding, gate |" in text) == (not variant.endswith("-fp32"))
    line = re.search(r"<p>Layers with weights that the quantizer left in float: (.*)</p>", page_of(run))[1]
    assert line == f"2 (embedding, gate) in {', '.join(f'atto-none-{name}' for name in QUANTIZERS)}."


def test_without_a_search_there_is_no_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    assert contests_of(run, assemble_groups(run)) == []
    page = page_of(run)
    assert 'id="bits"' not in page
    assert 'href="#bits"' not in page


def test_layers_left_in_float_are_told_without_a_search_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    path = tmp_path / "reports/profile/atto-oto50-int8/model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"float_layers": ["head"]}))
    monkeypatch.chdir(tmp_path)
    page = page_of(read_run(load_params(Params)))
    assert "left in float: 1 (head) in atto-oto50-int8.</p>" in page
    assert "Each search evaluates" not in page
