from pathlib import Path

import h5py
import numpy as np

from scripts import pack_case


def test_a_packed_case_is_the_same_case_and_smaller(tmp_path: Path) -> None:
    source, target = tmp_path / "a.npy.h5", tmp_path / "b.npy.h5"
    image, label = np.zeros((4, 64, 64), np.float32), np.zeros((4, 64, 64), np.float32)
    image[1, 10:20, 10:20], label[1, 12:18, 12:18] = 0.7, 3
    with h5py.File(source, "w") as file:
        file["image"], file["label"] = image, label
        file.attrs["spacing"] = (5.0, 1.0, 1.0)
    assert pack_case.main([str(source), str(target)]) == 0
    with h5py.File(target) as file:
        assert np.array_equal(file["image"], image)
        assert np.array_equal(file["label"], label)
        assert tuple(file.attrs["spacing"]) == (5.0, 1.0, 1.0)
    assert target.stat().st_size < source.stat().st_size / 4
    assert pack_case.main([str(tmp_path / "none"), str(target)]) == 2
