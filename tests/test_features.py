"""Features in the place of pixels: sums and products that are whole numbers, and the counts of scikit-learn."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from models import digits, save_bytes, to_inputs, train_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from pipeline.compute import features
from pipeline.compute.actor import LaneActor
from pipeline.compute.classifiers import nearest_mean, score_bytes, used_classifiers
from pipeline.compute.program import load_program
from pipeline.compute.search import search
from pipeline.compute.strips import TrainBlock
from pipeline.model import Model, ModelInput
from pipeline.plan import LaneAssignment, Plan
from pipeline.target import Target

CPU = torch.device("cpu")


def draw(num_images, num_values=19, seed=0, scale=1.0):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, num_values, generator=numbers) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_features_are_kept_as_whole_multiples_and_near(dtype, scale):
    outputs_ND = draw(50, scale=scale)
    kept_ND = features.to_features(outputs_ND, dtype)
    assert all((Fraction(value) * 2**24).denominator == 1 for value in kept_ND.double().flatten().tolist())
    error = (kept_ND.double() - outputs_ND.double()).abs()
    assert (error <= 2.0**-25 + outputs_ND.abs() * (2.0**-11 if dtype == torch.float16 else 2.0**-24)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_classes_are_exact_in_any_order(dtype):
    kept_ND, labels_N = features.to_features(draw(3000, scale=40.0), dtype), torch.arange(3000) % 3
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    sums_KD, counts_K = nearest_mean.class_sums(kept_ND, labels_N, 3)
    others_KD, _ = nearest_mean.class_sums(kept_ND[order], labels_N[order], 3)
    assert torch.equal(sums_KD, others_KD)
    expected = sum(Fraction(value) for value in kept_ND[labels_N == 1, 4].tolist())
    assert Fraction(int(sums_KD[1, 4]), 2**24) == expected
    means_KD = nearest_mean.class_means(sums_KD, counts_K, features.UNIT)
    torch.testing.assert_close(means_KD[1], kept_ND[labels_N == 1].double().mean(0).float())
    squares = nearest_mean.sum_squares(kept_ND)
    assert squares == nearest_mean.sum_squares(kept_ND[order])
    assert squares / features.SQUARE_UNIT == pytest.approx(float(kept_ND.double().square().sum()), rel=1e-6)


def test_unit_vectors_are_those_of_each_row_alone():
    kept_ND = torch.cat((draw(40, 700), draw(40, 700, 1, 1e-3), torch.zeros(1, 700)))
    units_ND = features.to_unit_vectors(kept_ND)
    for row in (0, 17, 55, 80):
        assert torch.equal(features.to_unit_vectors(kept_ND[row : row + 1])[0], units_ND[row])
    assert torch.equal(units_ND, units_ND.round())
    expected_ND = torch.nn.functional.normalize(kept_ND.double(), dim=1) * features.LENGTH
    assert (units_ND - expected_ND).abs().max() < 2.0**-17 * features.LENGTH


@pytest.mark.parametrize("block_rows", [5, 64, 301])
def test_the_search_is_that_of_whole_numbers(block_rows):
    train_TD, valid_ND = draw(301, 24), draw(20, 24, 3)
    blocks = [TrainBlock(train_TD[rows], rows, rows % 4) for rows in torch.arange(301).split(block_rows)]
    found = search(valid_ND, blocks, 20)
    whole_TD, whole_ND = (features.to_unit_vectors(each).long().numpy().astype(object) for each in (train_TD, valid_ND))
    for row in range(20):
        distances = [int(((whole_ND[row] - other) ** 2).sum()) for other in whole_TD]
        nearest = sorted(range(301), key=lambda index: (distances[index], index))[:20]
        assert found.rows_NJ[row].tolist() == nearest
        assert found.distances_NJ[row].tolist() == [distances[index] for index in nearest]


def test_pixels_as_features_find_the_neighbors_of_pixels_where_all_are_of_one_length():
    # Images of the same values in other places have the same norm: the cosine then orders them as the distance does.
    random = np.random.default_rng(0)
    values = random.integers(0, 256, 100, np.uint8)
    images_ND = torch.from_numpy(np.stack([random.permutation(values) for _ in range(400)]))
    rows_T = torch.arange(300)
    by_pixels, by_features = (
        search(each[300:], [TrainBlock(each[:300], rows_T, rows_T % 3)], 7)
        for each in (images_ND, features.to_features(images_ND.float() / 255, torch.float32))
    )
    # Of equal distances of pixels, rounding may put another first.
    np.testing.assert_array_equal(
        np.sort(by_pixels.distances_NJ, 1),
        np.rint(by_features.distances_NJ / features.LENGTH**2 * float((values.astype(float) ** 2).sum())),
    )


def test_names_and_scores_of_a_model_follow_from_its_outputs():
    logits = Model("", "logits", ModelInput(8, 8, "L"), (0.0,), (1.0,), 32, 10, tuple(range(10)))
    embedding = Model("", "embedding", ModelInput(8, 8, "L"), (0.0,), (1.0,), 32, 64)
    names = [each.name for each in used_classifiers(5, has_training=True, model=logits)]
    assert names == ["majority_class", "nearest_mean_l1", "nearest_mean_rms", "knn_1", "knn_5", "sgd_linear", "model"]
    names = [each.name for each in used_classifiers(5, has_training=True, model=embedding)]
    assert names == [
        "majority_class", "nearest_mean_euclidean", "nearest_mean_cosine", "knn_1", "knn_5", "knn_20", "sgd_linear",
    ]  # fmt: skip
    [knn_20] = [each for each in used_classifiers(20, has_training=False, model=embedding) if each.name == "knn_20"]
    assert knn_20.of == "features"
    assert score_bytes(10, logits) > score_bytes(10, embedding) == score_bytes(10)


@pytest.fixture(scope="module")
def trained():
    return train_digits()


def as_table(split, start, stop):
    import pyarrow as pa

    images_NHW, labels_N, keys = digits(split)
    rows = slice(start, stop)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images_NHW[rows].numpy())
    return pa.table({
        "key": keys[rows], "class": labels_N[rows].numpy().astype(np.int32), "image": tensors,
        "row": np.arange(len(keys[rows]), dtype=np.int32),
    })  # fmt: skip


def score_digits(content, dtype, num_epochs):
    """Run one actor on the digits; return its scored part and the training features."""
    num_train, num_valid = (len(digits(split)[2]) for split in ("train", "valid"))
    model = Model("", "embedding", ModelInput(8, 8, "L"), (0.0,), (1.0,), 32, 64, feature_dtype=dtype)
    plan = Plan(
        target=Target(8, 8, "L"), num_classes=10, assignment=LaneAssignment(num_train, 8), part_sizes=(num_valid,),
        has_training=True, batch_size=64, learning_rate=None, seed=0, gpus_per_actor=1.0, num_neighbors=5, model=model,
    )  # fmt: skip
    actor = LaneActor(plan, 0, 1, is_on_gpu=False, num_threads=2, program=load_program(content, CPU))
    for split, number in (("valid", num_valid), ("train", num_train)):
        for start in range(0, number, 130):
            table = as_table(split, start, start + 130)
            actor.add_train(start, table) if split == "train" else actor.add_valid(0, start, table)
    actor.finish_means()
    actor.begin_training()
    for epoch in range(1, num_epochs + 1):
        actor.train_epoch(epoch)
    for request in plan.requests("valid", {0: num_valid}, 1):
        actor.neighborhood.take(request, actor.neighborhood.search(actor.neighborhood.queries(request)))
    return actor.score_part(0, 0.01)


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")  # of a feature that is always 0
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_classifiers_of_features_count_as_scikit_learn(trained, one_thread, dtype):
    body, _ = trained
    scored = score_digits(save_bytes(body), dtype, 40)
    with torch.inference_mode():
        (train_ND, train_N), (valid_ND, valid_N) = (
            (features.to_features(body(to_inputs(images)), features.DTYPES[dtype]).double().numpy(), labels.numpy())
            for images, labels, _ in (digits("train"), digits("valid"))
        )
    means_KD = np.stack([train_ND[train_N == label].mean(0) for label in range(10)])

    def knn(number, **options):
        return KNeighborsClassifier(number, metric="cosine", algorithm="brute", **options).fit(train_ND, train_N)

    expected = {
        "nearest_mean_euclidean": NearestCentroid().fit(train_ND, train_N).predict(valid_ND),
        "nearest_mean_cosine": pairwise_distances(valid_ND, means_KD, metric="cosine").argmin(1),
        "knn_1": knn(1).predict(valid_ND),
        "knn_5": knn(5).predict(valid_ND),
        "knn_20": knn(20, weights=lambda distances: np.exp((1 - distances) / 0.07)).predict(valid_ND),
    }
    for name, predicted_N in expected.items():
        np.testing.assert_array_equal(scored.predictions[name], predicted_N, err_msg=name)
    # Another optimum: scikit-learn's is that of a penalty, the job's that of so many steps without one.
    linear = LogisticRegression(max_iter=2000).fit(train_ND, train_N).predict(valid_ND)
    difference = (scored.predictions["sgd_linear"] == valid_N).sum() - (linear == valid_N).sum()
    assert abs(int(difference)) <= 0.01 * len(valid_N)
    assert scored.neighbors.keys_NJ.shape == (len(valid_N), 5)
    np.testing.assert_allclose(scored.neighbors.distances_NJ, knn(5).kneighbors(valid_ND)[0], atol=1e-6)
