"""The pages in a real browser, on a real server: what somebody sees who opens its address."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser.conftest import Server
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from server.helpers import serving

from octavo.server import ServerConfig
from octavo.server.keys import digest_of
from octavo.testing.fake_engine import FakeEngine, FakeScript

pytestmark = [pytest.mark.server, pytest.mark.model]

PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
LONG = "Write a long story about a lighthouse."


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


class Chat:
    """The page at /, by what is on it."""

    def __init__(self, browser: Chrome, url: str):
        self.browser = browser
        browser.get(url)
        until(lambda: self.one("#model").text)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def send(self, text: str) -> None:
        self.one("#question").send_keys(text, Keys.ENTER)

    def set(self, **values: object) -> None:
        if not self.one("#settings").is_displayed():
            self.one("details.panel summary").click()
        for name, value in values.items():
            field = self.one(f"#settings [name={name}]")
            field.clear()
            field.send_keys(str(value))

    def click(self, label: str) -> None:
        buttons = [b for b in self.all("button") if b.is_displayed() and b.text == label]
        assert buttons, f"there is no button {label}"
        buttons[-1].click()

    @property
    def answer(self) -> str:
        return self.all(".answer")[-1].text

    @property
    def notes(self) -> str:
        return self.all(".notes")[-1].text

    def record_lengths(self) -> Callable[[], list[int]]:
        """From now on the page notes how long its answer is whenever that changes.

        Looking from outside, once in a round trip to the browser, misses most of a short answer.
        """
        self.browser.execute_script(
            "const lengths = window.lengths = [];"
            "new MutationObserver(() => {"
            "  const length = [...document.querySelectorAll('.answer')].at(-1)?.textContent.length;"
            "  if (length && length !== lengths.at(-1)) lengths.push(length);"
            "}).observe(document.body, {subtree: true, childList: true, characterData: true});"
        )
        return lambda: self.browser.execute_script("return window.lengths")

    def wait_for_end(self) -> None:
        until(lambda: self.one("#send").is_displayed() and not self.one("#stop").is_displayed())
        until(lambda: self.notes or self.all(".error")[-1].text)


@pytest.fixture
def chat(browser: Chrome, server: Server) -> Iterator[Chat]:
    yield Chat(browser, server.url)
    browser.get("about:blank")  # who goes away stops what runs
    until(lambda: server.load() == (0, 0))


@pytest.fixture(autouse=True)
def nothing_is_complained_of(browser: Chrome) -> Iterator[None]:
    yield
    assert browser.get_log("browser") == []


def assert_asks_nobody_else(browser: Chrome, url: str) -> None:
    asked = browser.execute_script(
        "return ['navigation', 'resource'].flatMap((kind) =>"
        "  performance.getEntriesByType(kind).map((entry) => entry.name))"
    )
    places = {urlsplit(name)[:2] for name in asked if not name.startswith("data:")}
    assert places == {urlsplit(url)[:2]}


def test_an_answer_streams_and_its_figures_are_shown(chat: Chat, server: Server) -> None:
    assert chat.one("#model").text == "smollm2-135m-instruct"
    chat.set(temperature=0, max_tokens=60)
    lengths = chat.record_lengths()
    chat.send("Count from one to thirty, one number a line.")
    until(lambda: "tokens/s" in chat.notes and " + " in chat.notes)
    assert len(lengths()) > 2, "the answer did not grow"  # a bit of it, more, all of it
    assert lengths() == sorted(lengths()), "what was shown was taken back"
    ttft, rate, usage = re.fullmatch(
        r"TTFT ([\d.]+) m?s · ([\d.]+) tokens/s · (.*?)(?: · .*)?", chat.notes
    ).groups()  # type: ignore[union-attr]
    assert float(ttft) > 0 and float(rate) > 1
    prompt, generated = re.match(r"(\d+).* \+ (\d+) tokens", usage).groups()  # type: ignore[union-attr]
    assert int(prompt) > 10 and 5 < int(generated) <= 60
    assert "cut off" in chat.notes or int(generated) < 60
    assert_asks_nobody_else(chat.browser, server.url)


def test_the_conversation_is_sent_along(chat: Chat) -> None:
    chat.set(temperature=0, max_tokens=8)
    chat.send("What is the capital of France?")
    chat.wait_for_end()
    until(lambda: " + " in chat.notes)
    first = int(re.search(r"(\d+)(?: \(\d+ cached\))? \+", chat.notes)[1])  # type: ignore[index]
    assert "Paris" in chat.answer
    chat.send("And of Italy?")
    until(lambda: len(chat.all(".turn")) == 2)
    chat.wait_for_end()
    until(lambda: " + " in chat.notes)
    second = int(re.search(r"(\d+)(?: \(\d+ cached\))? \+", chat.notes)[1])  # type: ignore[index]
    assert second > first + 8
    assert "cached" in chat.notes
    chat.click("New")
    assert not chat.all(".turn") and chat.one("#hello").is_displayed()


def test_stop_stops_the_server_too(chat: Chat, server: Server) -> None:
    chat.set(temperature=0)
    chat.send(LONG)
    until(lambda: len(chat.answer) > 20)
    assert server.load() == (1, 0)
    chat.click("Stop")
    until(lambda: server.load() == (0, 0))
    until(lambda: "stopped" in chat.notes)
    assert "tokens/s" in chat.notes
    text = chat.answer
    assert len(text) > 20
    chat.set(max_tokens=5)
    chat.click("Retry")
    chat.wait_for_end()
    until(lambda: "+ 5 tokens" in chat.notes)
    assert len(chat.all(".turn")) == 1 and text.startswith(chat.answer[:5])


def test_who_waits_is_told_why(chat: Chat, server: Server) -> None:
    with server.busy():
        chat.send("Hello")
        until(lambda: "The scheduler says: waiting" in chat.notes)
        assert re.match(r"No token after [\d.]+ s\. ", chat.notes)
        assert chat.answer == ""
    until(lambda: chat.answer)
    until(lambda: chat.notes.startswith("TTFT"))


def test_a_refusal_is_shown_in_the_servers_words_and_the_message_can_be_edited(
    chat: Chat,
) -> None:
    chat.set(top_p=7, max_tokens=3)
    chat.send("<b>Hello</b>")
    until(lambda: chat.all(".error")[-1].text)
    assert "top_p must be" in chat.all(".error")[-1].text
    [entry] = chat.browser.get_log("browser")  # the browser's own note of the status
    assert "400" in entry["message"]
    assert chat.one(".question").text == "<b>Hello</b>", "it is shown as it was typed"
    chat.click("Edit")
    field = chat.one("#question")
    assert field.get_attribute("value") == "<b>Hello</b>" and not chat.all(".turn")
    chat.set(top_p="")
    chat.one("#settings [name=top_p]").send_keys(Keys.BACKSPACE)
    field.send_keys(" there", Keys.ENTER)
    chat.wait_for_end()
    assert chat.one(".question").text == "<b>Hello</b> there" and chat.answer


def test_it_can_be_used_without_a_mouse_or_a_screen(chat: Chat) -> None:
    assert chat.browser.switch_to.active_element == chat.one("#question")
    chat.set(temperature=0)  # opens the parameters
    chat.send(LONG)
    until(lambda: len(chat.answer) > 20)
    answer = chat.one(".answer")
    assert answer.get_attribute("aria-live") == "polite"
    assert answer.get_attribute("aria-busy") == "true", "it is not read out word by word"
    chat.one("#stop").send_keys(Keys.ENTER)
    until(lambda: answer.get_attribute("aria-busy") == "false")
    until(lambda: chat.browser.switch_to.active_element == chat.one("#question"))
    controls = [c for c in chat.all("input, textarea, button, a, summary") if c.is_displayed()]
    assert len(controls) > 10
    assert all(control.accessible_name for control in controls)


def test_parameters_are_kept_and_messages_are_not(chat: Chat, server: Server) -> None:
    chat.set(temperature=0, max_tokens=7, system="You are a pirate.")
    chat.send("Hello")
    chat.wait_for_end()
    again = Chat(chat.browser, server.url)
    assert not again.all(".turn")
    values = {
        name: again.one(f"#settings [name={name}]").get_attribute("value")
        for name in ("temperature", "max_tokens", "top_p", "system")
    }
    assert values == {
        "temperature": "0",
        "max_tokens": "7",
        "top_p": "",
        "system": "You are a pirate.",
    }


MARKUP = "a **b** `c` <i>\n```py\nx = '**'\n```\nend <script>alert(1)</script>\n```\nopen"


def test_markdown_becomes_nodes_and_markup_stays_text(chat: Chat) -> None:
    html = chat.browser.execute_script(
        "const box = document.createElement('div'); box.append(...marked(arguments[0]));"
        "return box.innerHTML",
        MARKUP,
    )
    assert html == (
        "a <strong>b</strong> <code>c</code> &lt;i&gt;"
        "<pre tabindex=\"0\"><code>x = '**'\n</code></pre>"
        "end &lt;script&gt;alert(1)&lt;/script&gt;"
        '<pre tabindex="0"><code>open</code></pre>'
    )


def test_reasoning_is_folded(chat: Chat) -> None:
    chat.browser.execute_script(
        "const turn = new Turn('Why?'); turns.push(turn); $('turns').append(turn.section);"
        "turn.askedAt = performance.now();"
        "for (const delta of [{reasoning_content: 'Because'}, {content: 'So'}])"
        "  turn.take({choices: [{delta}]})"
    )
    until(lambda: chat.answer == "So")
    text = chat.one(".reasoning div")
    assert not text.is_displayed()
    chat.one(".reasoning summary").click()
    assert text.is_displayed() and text.text == "Because"


@pytest.fixture
def phone(browser: Chrome) -> Iterator[Chrome]:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def assert_nothing_sticks_out(browser: Chrome) -> None:
    width, wanted = browser.execute_script(
        "return [innerWidth, document.documentElement.scrollWidth]"
    )
    assert width == PHONE["width"] and wanted <= width
    # What scrolls by itself may be wide inside; what holds it may not.
    inner = (
        "const main = document.querySelector('main'); return main.scrollWidth - main.clientWidth"
    )
    assert browser.execute_script(inner) == 0


def test_the_chat_fits_a_phone(phone: Chrome, chat: Chat) -> None:
    assert_nothing_sticks_out(phone)
    chat.set(temperature=0, max_tokens=5)
    chat.one("#question").send_keys("A" * 200)
    chat.click("Send")  # Enter is for new lines there
    chat.wait_for_end()
    phone.execute_script(
        "turns[0].text = '```\\n' + 'x'.repeat(300) + '\\n```\\n' + 'y'.repeat(300);turns[0].draw()"
    )
    until(lambda: chat.all(".answer pre"))
    assert_nothing_sticks_out(phone)
    bottom = phone.execute_script(
        "return document.querySelector('#question').getBoundingClientRect().bottom"
    )
    assert 0 < bottom <= PHONE["height"]


def test_the_docs_list_every_route(browser: Chrome, server: Server) -> None:
    browser.get(f"{server.url}/docs")
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "details.route"))
    shown = {
        tuple(box.find_element(By.CSS_SELECTOR, part).text for part in (".method", ".path"))
        for box in browser.find_elements(By.CSS_SELECTOR, "details.route")
    }
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert shown == {(method.upper(), path) for path in paths for method in paths[path]}
    box = browser.find_element(By.ID, "OpenAIRoutes.chat_completions")
    box.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    until(lambda: box.get_attribute("open"))
    assert f"curl -N {server.url}/v1/chat/completions" in box.text
    assert "messages\narray of Message\nrequired" in box.text
    assert "keep the k likeliest tokens" in box.text
    assert_asks_nobody_else(browser, server.url)


def test_the_docs_fit_a_phone(phone: Chrome, server: Server) -> None:
    phone.get(f"{server.url}/docs")
    until(lambda: phone.find_elements(By.CSS_SELECTOR, "details.route"))
    phone.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert_nothing_sticks_out(phone)


def test_a_key_is_asked_for_and_kept_for_the_tab_only(browser: Chrome, tmp_path: Path) -> None:
    path, engine = tmp_path / "keys.toml", FakeEngine()
    path.write_text(f'[[keys]]\nname = "user"\nsha256 = "{digest_of(b"k-user")}"\n')
    with serving(engine, ServerConfig(api_key_file=str(path))) as locked:
        browser.get(locked.url)
        until(lambda: browser.find_element(By.ID, "key").is_displayed())
        browser.find_element(By.ID, "key-field").send_keys("k-user", Keys.ENTER)
        until(lambda: browser.find_element(By.ID, "model").text == "fake-model")
        assert not browser.find_element(By.ID, "key").is_displayed()
        browser.get_log("browser")  # the browser's own note of the 401
        stored = browser.execute_script(
            "return [Object.values(sessionStorage), Object.values(localStorage)]"
        )
        assert stored == [["k-user"], []]
        engine.script.queue_delay_s = 2.5
        chat = Chat(browser, locked.url)
        chat.send("Hello")
        until(lambda: "This key may not ask why." in chat.notes)
        until(lambda: "Answer 0 to: user: Hello" in chat.answer)
        messages = [entry["message"] for entry in browser.get_log("browser")]
        assert messages and all("403" in message for message in messages)
        browser.get("about:blank")


def test_a_failure_in_the_stream_is_shown_below_what_came(browser: Chrome) -> None:
    engine = FakeEngine(FakeScript(fail_after=8))
    with serving(engine, ServerConfig()) as failing:
        chat = Chat(browser, failing.url)
        chat.send("Hello")
        until(lambda: "the fake engine failed as told" in chat.all(".error")[-1].text)
        until(lambda: chat.answer == "Answer 0")
        browser.get("about:blank")
