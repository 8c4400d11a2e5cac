"""Chat templates that would run for hours or fill the memory are stopped; the templates in use are not."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from secateur.runtime import chat_bounds
from secateur.runtime.chat import ChatTemplate
from secateur.runtime.errors import BundleError, SecateurError

HUNDRED = "range(100000)"
GREEDY = {
    "loops in loops": f"{{% for a in {HUNDRED} %}}{{% for b in {HUNDRED} %}}{{% endfor %}}{{% endfor %}}",
    "a loop that leaves out": (
        f"{{% for a in {HUNDRED} %}}{{% for b in {HUNDRED} if false %}}{{% endfor %}}{{% endfor %}}"
    ),
    "a recursive loop": "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "macros that call each other": (
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(64) }}"
    ),
    "a macro without end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "text times": "{{ 'x' * 10 ** 9 }}",
    "a list times": "{{ ([0] * 10 ** 9) | length }}",
    "text doubled by +": "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "text doubled by ~": "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "text doubled by a block": (
        "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set x %}{{ n.t }}{{ n.t }}{% endset %}"
        "{% set n.t = x %}{% endfor %}"
    ),
    "a list doubled": "{% set n = namespace(t=[0]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "lists of lists": (
        "{% set n = namespace(t=['xxxxxxxx']) %}{% for i in range(60) %}{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.t }}"
    ),
    "center": "{{ 'x' | center(1000000000) }}",
    "the method center": "{{ 'x'.center(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'x\ny' | indent(1000000000) }}",
    "tojson": "{{ [[1]] | tojson(indent=1000000000) }}",
    "replace": "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
    "the method replace": "{{ ('x' * 1000000).replace('', 'y' * 1000000) }}",
    "join": "{{ range(100000) | join('y' * 1000000) }}",
    "the method join": "{{ ('y' * 1000000).join(['x'] * 100000) }}",
    "join of what comes one by one": "{{ range(100000) | map('string') | join('y' * 1000000) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a given width": "{{ '%*d' % (1000000000, 1) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "the method format": "{{ '{:1000000000}'.format(1) }}",
    "format of much": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "a power": "{{ 9 ** 1000000 }}",
    "a square of a square": (
        "{% set n = namespace(t=10) %}{% for i in range(60) %}{% set n.t = n.t * n.t %}{% endfor %}{{ n.t }}"
    ),
    "filters on filters": f"{{% for a in {HUNDRED} %}}{{{{ {HUNDRED} | list | length }}}}{{% endfor %}}",
    "map of lists": f"{{{{ ([{HUNDRED}] * 10000) | map('list') | list | length }}}}",
    "map of sums": f"{{{{ ([{HUNDRED}] * 100000) | map('sum') | list | length }}}}",
    "slices": f"{{% set a = {HUNDRED} | list %}}{{% for i in {HUNDRED} %}}{{% set b = a[:] %}}{{% endfor %}}",
    "searches": f"{{% set a = {HUNDRED} | list %}}{{% for i in {HUNDRED} %}}{{{{ -1 in a }}}}{{% endfor %}}",
    "printing": f"{{% for i in {HUNDRED} %}}{{{{ 'x' * 10000 }}}}{{% endfor %}}",
    "lipsum": "{{ lipsum(n=1000000) }}",
}  # fmt: skip


@pytest.mark.parametrize("case", GREEDY)
def test_a_template_that_takes_too_much_is_stopped(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_bounds, "SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(SecateurError) as caught:
        ChatTemplate(GREEDY[case], {}).render([{"role": "user", "content": "hi"}])
    assert time.monotonic() - start < 10
    assert "chat template" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_bound_on_steps_says_what_to_do() -> None:
    with pytest.raises(BundleError) as caught:
        ChatTemplate(GREEDY["loops in loops"], {}).render([{"role": "user", "content": "hi"}])
    assert str(caught.value) == (
        "chat_template.jinja: the chat template was stopped: it takes more than 268435456 steps; "
        "give shorter messages, or take the template of the original checkpoint"
    )


def test_every_filter_and_test_of_jinja_is_counted() -> None:
    """A list of a thousand goes through each of them; none may leave the budget as it was."""
    environment = chat_bounds.BoundedEnvironment()
    context = environment.from_string("").new_context()
    for kind, functions in (("filter", environment.filters), ("test", environment.tests)):
        for name in functions:
            environment.budget.start()
            before = environment.budget.left
            ask = environment.call_filter if kind == "filter" else environment.call_test
            with suppress(Exception):  # many want another value, or further arguments
                ask(name, ["x"] * 1000, context=context)
            assert environment.budget.left <= before - 1000, f"{kind} {name}"


def test_a_long_conversation_is_rendered() -> None:
    said = "'<|' + m.role + '|>' ~ (m.content | trim | replace('</think>', ''))"
    template = ChatTemplate(f"{{% for m in messages %}}{{{{ {said} }}}}\n{{% endfor %}}", {})
    messages = [{"role": "user", "content": "word </think>" * 1000} for _ in range(100)]
    assert template.render(messages) == f"<|user|>{'word ' * 1000}\n" * 100


def test_threads_have_budgets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread's hostile messages take nothing from another's."""
    monkeypatch.setattr(chat_bounds, "MOST_STEPS", 1 << 25)
    loops = GREEDY["loops in loops"]
    template = ChatTemplate(
        f"{{% if messages[0].content == 'much' %}}{loops}{{% endif %}}{{{{ messages[0].content }}}}", {}
    )
    answers: list[str] = []

    def ask(content: str) -> None:
        try:
            answers.append(template.render([{"role": "user", "content": content}]))
        except BundleError as error:
            answers.append(type(error).__name__)

    threads = [threading.Thread(target=ask, args=(content,)) for content in ("much", "a", "b", "much")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answers) == ["BundleError", "BundleError", "a", "b"]
