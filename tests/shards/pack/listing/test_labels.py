"""Classes by folders: taken where they look like classes, said why, and never guessed from dates or trees."""

import re

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.pack.listing import labels
from beitforge.shards.pack.listing.folders import Folders


def labels_of(paths, asked):
    return labels.labels_of(paths, Folders.of(paths), asked)


@pytest.mark.parametrize(
    ("paths", "asked", "classes", "of"),
    [
        (["b/1.jpg", "a/2.jpg", "b/3.jpg"], "auto", ["a", "b"], [1, 0, 1]),
        (["b/1.jpg", "a/x/2.jpg", "b/3.jpg"], "folder", ["a", "b"], [1, 0, 1]),
        (["2018/1.jpg", "2019/2.jpg"], "folder", ["2018", "2019"], [0, 1]),
        (["a/1.jpg", "a/2.jpg"], "folder", ["a"], [0, 0]),
        (["a/1.jpg", "b/2.jpg"], "none", [], []),
        (["n01440764/1.jpg", "n01443537/1.jpg"], "auto", ["n01440764", "n01443537"], [0, 1]),
        (["3d-models/1.jpg", "1950s cars/1.jpg"], "auto", ["1950s cars", "3d-models"], [1, 0]),
        (["train/1.jpg", "bus/1.jpg"], "auto", ["bus", "train"], [1, 0]),
        (["Volvo 240 Sedan 1993/1.jpg", "marten/1.jpg"], "auto", ["Volvo 240 Sedan 1993", "marten"], [0, 1]),
        (["class0/1.jpg", "class1/1.jpg"], "auto", ["class0", "class1"], [0, 1]),
    ],
)
def test_classes(paths, asked, classes, of):
    """The first folder is the class, when that is unambiguous or asked for; class numbers follow sorted names."""
    found = labels_of(paths, asked)
    assert (found.classes, found.of.tolist()) == (classes, of)
    assert ("--labels none" in found.why) == (asked == "none" or asked == "auto")


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["2018/1.jpg", "2019/2.jpg"], r"numbers or dates for names .*2018, 2019\); --labels folder"),
        (["2018/1.jpg", "2019/2.jpg", "misc/3.jpg"], "numbers or dates"),
        (["2018-05-12/1.jpg", "2018-05-13/2.jpg"], "numbers or dates"),
        (["2018 Rome/1.jpg", "2019_Oslo/2.jpg"], "numbers or dates"),
        (["0/1.jpg", "1/2.jpg"], "numbers or dates"),
        (["2018年05月/1.jpg", "2018年06月/2.jpg"], "numbers or dates"),
        (["Jan 2018/1.jpg", "02 february/2.jpg", "March/3.jpg", "september/4.jpg", "dec/5.jpg"], "numbers or dates"),
        (["100CANON/1.jpg", "101CANON/2.jpg"], "numbers or dates"),
        (["train2017/1.jpg", "val2017/2.jpg"], "parts of a set"),
        (["part_1/1.jpg", "New folder (2)/2.jpg"], "parts of a set"),
        (["cat/1.jpg", "007/2.jpg"], r"numbers or dates for names .*\(007\)"),
        (["2018/05/1.jpg", "2019/06/2.jpg"], r"folders in folders \(2018/05/1\.jpg\)"),
        (["train/cat/1.jpg", "val/cat/2.jpg"], r"folders in folders .*--labels folder"),
        (["cat/1.jpg", "dog/big/2.jpg"], "folders in folders"),
        (["train/1.jpg", "Test/2.jpg"], "parts of a set"),
        (["a/1.jpg", "b/2.jpg", "3.jpg"], r"3\.jpg lies in no sub-folder"),
        (["1.jpg", "2.jpg"], "there are no sub-folders"),
        (["a/1.jpg", "a/2.jpg"], "one sub-folder, a; --labels folder"),
    ],
)
def test_auto_does_not_guess_and_says_why(paths, why):
    found = labels_of(paths, "auto")
    assert found.classes == [] and len(found.of) == 0
    assert re.search(why, found.why), found.why


def test_folder_labels_refuse_a_stray_image():
    """Asked for classes, an image without one is an error and not class 0."""
    with pytest.raises(ShardError, match=r"3\.jpg lies in no sub-folder"):
        labels_of(["a/1.jpg", "3.jpg"], "folder")
