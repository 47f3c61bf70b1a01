"""A network trained on all of MNIST: its count is that of a plain loop, and those of its features scikit-learn's."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import save
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_job import accuracy, evaluate
from torch import nn

pytestmark = [pytest.mark.ray, pytest.mark.data, pytest.mark.long, pytest.mark.usefixtures("local_ray")]


def load(root, split):
    """Inputs of a split, float32 [N, 1, 28, 28], labels [N] and keys, in the order of the files."""
    paths = sorted((root / split).rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = np.array([int(path.parent.name) for path in paths])
    return torch.from_numpy(pixels)[:, None].float().div(255), labels, [str(path.relative_to(root)) for path in paths]


@pytest.fixture(scope="module")
def images(mnist_png):
    return load(mnist_png, "train"), load(mnist_png, "valid")


@pytest.fixture(scope="module")
def trained(images):
    """A body of 48 features, and the body with a head, after an epoch."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(784, 48), nn.ReLU(),
    )  # fmt: skip
    net = nn.Sequential(body, nn.Linear(48, 10))
    (inputs_NCHW, labels_N, _), optimizer = images[0], torch.optim.Adam(net.parameters(), 2e-3)
    for rows in torch.randperm(len(labels_N)).split(128):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs_NCHW[rows]), torch.from_numpy(labels_N)[rows]).backward()
        optimizer.step()
    return body.eval(), net.eval()


@torch.inference_mode()
def run_all(net, inputs_NCHW):
    return torch.cat([net(some) for some in inputs_NCHW.split(1000)]).numpy()


def test_the_count_and_the_logits_are_those_of_a_plain_loop(mnist_png, images, trained, tmp_path):
    model = save(trained[1], tmp_path / "model.pt2", (1, 28, 28))
    run = evaluate(mnist_png, tmp_path / "out", model=model, epochs=0, neighbors=0, actors=2)
    inputs_NCHW, labels_N, keys = images[1]
    logits_NK = run_all(trained[1], inputs_NCHW)
    assert accuracy(run, "model")["num_correct"] == int((logits_NK.argmax(1) == labels_N).sum())
    rows = pq.read_table(tmp_path / "out" / "predictions", columns=["key", "model_scores"])
    places = {key: place for place, key in enumerate(keys)}
    order = [places[key] for key in rows["key"].to_pylist()]
    scores_NK = rows["model_scores"].combine_chunks().flatten().to_numpy().reshape(-1, 10)
    # Scores are probabilities, so logits less what all of them share.
    got_NK, expected_NK = np.log(scores_NK), torch.from_numpy(logits_NK[order]).log_softmax(1).numpy()
    is_seen_NK = expected_NK > np.log(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(got_NK[is_seen_NK], expected_NK[is_seen_NK], rtol=1e-5, atol=1e-5)


# Of a feature that is always 0; and of an optimum that is found to more digits than counts need.
@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_", "ignore:lbfgs failed to converge")
def test_classifiers_of_features_count_as_scikit_learn(mnist_png, images, trained, tmp_path):
    model = save(trained[0], tmp_path / "model.pt2", (1, 28, 28))
    run = evaluate(mnist_png, tmp_path / "out", model=model, model_output="embedding", neighbors_of="valid")
    (train_ND, train_N), (valid_ND, valid_N) = (
        (run_all(trained[0], inputs_NCHW), labels_N) for inputs_NCHW, labels_N, _ in images
    )
    means_KD = np.stack([train_ND[train_N == label].mean(0, dtype=np.float64) for label in range(10)])
    near = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(train_ND, train_N).kneighbors(valid_ND)
    distances_NJ, labels_NJ = near[0], train_N[near[1]]
    predicted = {
        "nearest_mean_euclidean": NearestCentroid().fit(train_ND, train_N).predict(valid_ND),
        "nearest_mean_cosine": pairwise_distances(valid_ND, means_KD, metric="cosine").argmin(1),
        "knn_1": labels_NJ[:, 0],
        "knn_5": [np.bincount(each[:5], minlength=10).argmax() for each in labels_NJ],
        "knn_20": [
            np.bincount(each, np.exp((1 - own) / 0.07), 10).argmax()
            for each, own in zip(labels_NJ, distances_NJ, strict=True)
        ],
    }
    for name, predicted_N in predicted.items():
        assert abs(accuracy(run, name)["num_correct"] - int((predicted_N == valid_N).sum())) <= 2, name
    # Without a penalty, as SGD; its optimum is the same on scaled features, and sooner found. Where the loss is almost
    # flat, both stop before it, at other places: a thousandth of the images may differ.
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=np.inf, max_iter=100)).fit(train_ND, train_N)
    linear_N = linear.predict(valid_ND)
    assert abs(accuracy(run, "sgd_linear")["num_correct"] - int((linear_N == valid_N).sum())) <= 10
