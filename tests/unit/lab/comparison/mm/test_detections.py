"""Ground truth and detections are read as the tests of MMEngine leave them."""

import json

from kd_plugins.lab.comparison.mm.detections import read_ground_truth


def test_ground_truth_maps_classes_by_name(tmp_path):
    coco = dict(
        categories=[dict(id=7, name='b'), dict(id=9, name='a'), dict(id=1, name='not used')],
        images=[dict(id=1), dict(id=2)],
        annotations=[
            dict(image_id=1, category_id=7, bbox=[1, 2, 3, 4], iscrowd=0),
            dict(image_id=1, category_id=9, bbox=[0, 0, 1, 1], iscrowd=1),
            dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1]),
        ],
    )
    (tmp_path / 'a.json').write_text(json.dumps(coco))
    truth = read_ground_truth(tmp_path / 'a.json', ('a', 'b'))
    assert truth[1].boxes.tolist() == [[1, 2, 4, 6]] and truth[1].labels.tolist() == [1]
    assert truth[2].boxes.shape == (0, 4)
