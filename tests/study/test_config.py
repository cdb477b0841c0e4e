import pytest

from gapprobe.demo import FOLDER
from gapprobe.errors import ConfigError
from gapprobe.study.config import StudyConfig, load_config, load_configs
from gapprobe.study.study import Study

MINIMAL = 'name = "n"\nmodel = "m"\nimages = "i"\nquestions = "q.csv"\nprompts = "p.toml"\n'


def test_paths_are_read_from_the_folder_of_the_file_and_ids_stay_ids(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "c.toml").write_text(MINIMAL)
    config = load_config(tmp_path / "c.toml")
    assert config.model_source == tmp_path / "m"
    assert config.path(config.images) == tmp_path / "i"
    assert config.model_copy(update={"model": "owner/model"}).model_source == "owner/model"
    assert config.model_copy(update={"model": "./nowhere"}).model_source == tmp_path / "nowhere"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('nme = "x"', "nme is not a setting; the settings are batch_size"),
        ("title = 3", "title: Input should be a valid string"),
        ("images_per_question = 0", "images_per_question: .*greater than or equal to 1"),
        ('judge = "kind"', "judge: .*'sound' or 'published'"),
        ('trivial_images = ["grey"]', r"trivial_images\.0"),
        ("trivial_images = []", "trivial_images"),
        ("layers = [-1]", "layers"),
        ("layers = [4, 6]", "layers must hold 0 for the control layer_0"),
        ("[probe]\nc = 0", r"probe\.c: .*greater than 0"),
        ("[probe]\nfold = 3", r"probe\.fold is not a setting; the settings are c, "),
        ('[probe]\nsplits = ["digit"]', r"probe\.splits\.0"),
        ('seed = "one"', "seed"),
        ("[samples]\ncount = 1", r"samples\.count: .*greater than or equal to 2"),
        ("[samples]\nheat = 1", r"samples\.heat is not a setting; the settings are count, temperature"),
        ("[choices]\noptions = 1", r"choices\.options"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_wrong(tmp_path, line: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(MINIMAL + line + "\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.toml")


def test_a_missing_setting_and_a_missing_file_are_named(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('name = "n"\n')
    with pytest.raises(ConfigError, match="model: Field required"):
        load_config(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "c.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "c.toml")


def test_only_what_the_model_is_asked_tells_output_folders_apart() -> None:
    config = load_config(FOLDER / "llava.toml")
    assert config.model_copy(update={"judge": "published", "title": "x"}).asked == config.asked
    for change in ({"seed": 1}, {"max_new_tokens": 3}, {"trivial_images": ("black",)}, {"model": "m"}):
        assert config.model_copy(update=change).asked != config.asked


def test_listing_the_classes_changes_what_is_asked_and_leaving_it_out_does_not(tmp_path) -> None:
    config = load_config(FOLDER / "llava.toml")
    listed = config.model_copy(update={"list_classes": True})
    assert "list_classes" not in config.asked  # folders of studies from before there was such a setting stay theirs
    assert listed.asked != config.asked
    asked = Study(listed, tmp_path, progress=False).trials[0].identification.text
    assert "It is one of: eight, five, four, nine, one, seven, six, three, two, zero." in asked


@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_the_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(FOLDER / f"{name}.toml")
    assert isinstance(config, StudyConfig)
    assert config.name == name


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", "", ".hidden"])
def test_a_name_that_leads_out_of_the_output_folder_is_refused(tmp_path, name: str) -> None:
    (tmp_path / "c.toml").write_text(MINIMAL.replace('name = "n"', f'name = "{name}"'))
    with pytest.raises(ConfigError, match="name: String should match pattern"):
        load_config(tmp_path / "c.toml")


SETS = """
name = "n"
model = "m"
prompts = "p.toml"
seed = 3
[data.birds]
images = "birds"
questions = "birds.csv"
[data.cars]
images = "cars"
questions = "cars.csv"
seed = 4
"""


def test_a_file_with_several_data_sets_is_as_many_studies(tmp_path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(SETS)
    birds, cars = load_configs(path)
    assert (birds.name, birds.images, birds.seed) == ("n-birds", "birds", 3)
    assert (cars.name, cars.images, cars.seed) == ("n-cars", "cars", 4)
    assert load_configs(path, ["cars"]) == [cars]
    with pytest.raises(ConfigError, match="several data sets"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"no \[data\.boats\]; it has birds, cars"):
        load_configs(path, ["boats"])
    path.write_text(SETS + 'model = "other"\n')
    with pytest.raises(ConfigError, match=r"data\.cars\.model is one for all data sets"):
        load_configs(path)
    path.write_text(SETS.replace('questions = "cars.csv"', ""))
    with pytest.raises(ConfigError, match="questions: Field required"):
        load_configs(path)
    path.write_text('data = 3\nname = "n"\n')
    with pytest.raises(ConfigError, match="data must be tables"):
        load_configs(path)


def test_a_file_of_one_data_set_has_none_to_choose(tmp_path) -> None:
    (tmp_path / "c.toml").write_text(MINIMAL)
    assert load_configs(tmp_path / "c.toml") == [load_config(tmp_path / "c.toml")]
    with pytest.raises(ConfigError, match="has no tables"):
        load_configs(tmp_path / "c.toml", ["cars"])
