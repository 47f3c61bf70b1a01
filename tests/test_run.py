from importlib.metadata import version

from pipeline.results.run import library_versions


def test_versions_are_those_installed():
    versions = library_versions()
    assert list(versions) == ["python", "torch", "ray", "pillow", "pyarrow"]
    assert versions["pyarrow"] == version("pyarrow")
