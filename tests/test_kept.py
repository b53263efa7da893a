"""What is opened once and kept."""

from concurrent.futures import ThreadPoolExecutor

from llmfast.kept import keeping, kept


def test_what_is_kept_is_opened_once() -> None:
    opened = []

    @kept
    def open_it(name: str) -> list[str]:
        opened.append(name)
        return [name]

    assert open_it("a") is not open_it("a")
    with keeping():
        assert open_it("a") is open_it("a")
        open_it("b")
        with ThreadPoolExecutor(1) as other:
            other.submit(open_it, "b").result()
    open_it("a")
    assert opened == ["a", "a", "a", "b", "b", "a"]
