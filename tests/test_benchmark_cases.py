from benchmarks import cases


def test_sgd_is_done_with_two_sizes_of_batch(noisy_dataset, tmp_path):
    names = ("actor", "actors_2", "torch_loop")
    options = cases.Options("sgd", names, noisy_dataset, tmp_path, (), "folder", 0)
    first, second = cases.make_cases(options)
    assert (first.title, first.commands, first.base) == ("sgd, batch 256", ("actor", "torch_loop"), "actor")
    assert (second.title, second.commands, second.base) == ("sgd, batch 4,096", ("actor", "actors_2"), "actor")
    assert first.request["arrays"] == str(tmp_path / "arrays")


def test_another_form_is_for_this_program_alone(noisy_dataset, tmp_path):
    options = cases.Options("mnist", ("evaluate",), noisy_dataset, tmp_path, (), "tar", 0)
    (case,) = cases.make_cases(options)
    assert case.title == "mnist, 42 images, tar"
    assert case.options[:2] == ("--data", str(tmp_path / f"{noisy_dataset.name}-tar"))
