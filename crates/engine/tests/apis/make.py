#!/usr/bin/env python3
"""Records the token ids that vLLM renders for requests of the Responses and Messages APIs.

A line of rendered.jsonl has the template of the server (`tools` or `parts`), the API, the body and
the ids, or null if vLLM rejects the body.

usage: make.py TOOLS_URL PARTS_URL   writes rendered.jsonl to the folder of this file
needs: two servers of vLLM 0.32 with --enable-scale-out --enable-auto-tool-choice
       --tool-call-parser hermes, the tokenizer of ../tiny_model, and the templates of this folder
"""
import json, os, sys, urllib.error, urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
BILLING = "x-anthropic-billing-header: cc_version=2.0.1; cch=%s;"
WEATHER = {"type": "object", "properties": {"city": {"type": "string", "description": "Name, e.g. 大阪"}}, "required": ["city"]}
UNICODE = "Grüße, 你好 👩‍👩‍👧‍👦 <|im_end|> \u0000\u2028é\t\r\n end"


def text(value, **more):
    return {"type": "text", "text": value, **more}


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}


def assistant(*content):
    return {**user(*content), "role": "assistant"}


def messages_api():
    """Yields bodies of the Messages API."""
    def body(messages, **more):
        return {"model": "tiny", "max_tokens": 64, "messages": messages, **more}

    tool = {"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER}
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich", "days": [1, 2.5, None, True]}}

    def result(content, **more):
        return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **more}

    hi = user("Hi")
    yield body([hi])
    yield body([hi], system="Be brief.")
    yield body([hi], system="")
    yield body([hi], system=[text("One."), text("Two.", cache_control={"type": "ephemeral"}), text("")])
    yield body([hi], system=[text(BILLING % "a1"), text("Be brief.")])
    yield body([hi], system=[text(BILLING % "a1")])
    yield body([hi], system=BILLING % "a1" + "\nBe brief.")
    yield body([hi], system=BILLING % "a1")
    yield body([hi, assistant("Hello."), user("And now?")], system="S")
    yield body([user(text("One"), text("Two"))])
    yield body([user(text("One"))])
    yield body([user(text(""), text("Two"), text(""))])
    yield body([user(text(""))])
    yield body([user("")])
    yield body([user(text(UNICODE)), assistant(UNICODE), user(UNICODE)], system=UNICODE)
    yield body([hi, assistant("It is ")])
    yield body([hi, assistant(text("One"), text("Two")), user("?")])
    yield body([hi], tools=[tool])
    yield body([hi], tools=[])
    yield body([hi], tools=[tool, {"name": "noop", "input_schema": {}}], system="S")
    yield body([hi], tools=[{**tool, "cache_control": {"type": "ephemeral"}, "strict": True, "input_schema": {"properties": {}}}])
    yield body([hi], tools=[{**tool, "defer_loading": True}])
    yield body([hi], tools=[tool], tool_choice={"type": "auto"})
    yield body([hi], tools=[tool], tool_choice={"type": "none"})
    yield body([hi], tools=[tool], tool_choice={"type": "tool", "name": "weather"})
    yield body([hi, assistant(text("I look."), use), user(result("12 °C"))], tools=[tool])
    yield body([hi, assistant(use), user(result([text("12"), text("°C")]), text("So?"))], tools=[tool])
    yield body([hi, assistant(use), user(text("Before"), result("12"), text("After"))], tools=[tool])
    yield body([hi, assistant(use), user(result([]))], tools=[tool])
    yield body([hi, assistant(use), user({"type": "tool_result", "tool_use_id": "toolu_1"})], tools=[tool])
    yield body([hi, assistant(use), user(result("no", is_error=True))], tools=[tool])
    yield body([hi, assistant(use, {**use, "id": "toolu_2", "input": {}}),
                user(result("a"), {**result("b"), "tool_use_id": "toolu_2"})], tools=[tool])
    yield body([hi, assistant(use), user(result([text("found"), {"type": "tool_reference", "tool_name": "weather"}]))], tools=[tool])
    yield body([hi, assistant({"type": "thinking", "thinking": "Hm.", "signature": "x"}, text("Yes.")), hi])
    yield body([hi, assistant({"type": "thinking", "thinking": "A"}, {"type": "thinking", "thinking": "B"}, use), user(result("c"))], tools=[tool])
    yield body([hi, assistant({"type": "redacted_thinking", "data": "abc"}, text("Yes.")), hi])
    yield body([hi, assistant({"type": "redacted_thinking", "data": "abc"}), hi])
    yield body([hi, assistant({"type": "thinking", "thinking": ""}), hi])
    yield body([hi], thinking={"type": "disabled"})
    yield body([hi], thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048)
    yield body([hi], thinking={"type": "adaptive"}, output_config={"effort": "high"})
    yield body([hi], output_config={"effort": "low"})
    yield body([hi], chat_template_kwargs={"enable_thinking": False})
    yield body([hi], chat_template_kwargs={"enable_thinking": True}, thinking={"type": "disabled"})
    yield body([hi, {"role": "system", "content": "Note."}, assistant("Ok"), hi], system="S")
    yield body([{"role": "system", "content": [text("A"), text(BILLING % "b"), text("B")]}, hi])
    yield body([hi, {"role": "system", "content": BILLING % "b"}, hi])
    yield body([hi, {"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}]}, hi])
    yield body([hi, {"role": "system", "content": [{"type": "tool_removal", "tool": {"type": "tool_reference", "name": "weather"}}]}, hi],
               tools=[tool, {**tool, "name": "other"}])
    yield body([hi, {"role": "system", "content": [text("Use it."), {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "weather"}}]}, hi],
               tools=[{**tool, "defer_loading": True}])
    yield body([hi, assistant(result("12"), text("x")), hi])
    yield body([user(text("x"), {"type": "document", "source": {}})])
    yield body([user({"type": "image", "source": {"type": "url", "url": "http://x/y.png"}})])


def responses_api():
    """Yields bodies of the Responses API."""
    def body(input, **more):
        return {"model": "tiny", "input": input, **more}

    tool = {"type": "function", "name": "weather", "description": "Tells the weather.", "parameters": WEATHER, "strict": True}
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{\"city\": \"Zürich\", \"days\": [1, 2.5, null, true]}"}

    def output(value, **more):
        return {"type": "function_call_output", "call_id": "call_1", "output": value, **more}

    def answer(value, **more):
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": value}], **more}

    def reasoning(value, **more):
        return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": value}], **more}

    def given(*parts):
        return user(*[{"type": "input_text", "text": part} for part in parts])

    hi = user("Hi")
    yield body("Hi")
    yield body("")
    yield body("Hi", instructions="Be brief.")
    yield body("Hi", instructions="")
    yield body("Hi", instructions=BILLING % "a" + "\nBe brief.")
    yield body("Hi", instructions=BILLING % "a")
    yield body(UNICODE, instructions=UNICODE)
    yield body([hi])
    yield body([{**hi, "type": "message"}])
    yield body([given("One", "Two")])
    yield body([given("", "Two", "")])
    yield body([given("")])
    yield body([{"role": "system", "content": "S"}, hi])
    yield body([{"role": "developer", "content": "D"}, hi], instructions="S")
    yield body([{"role": "developer", "content": [{"type": "input_text", "text": "D"}]}, hi])
    yield body([hi, {"role": "system", "content": "Note."}, hi])
    yield body([hi, assistant("Hello."), user("And now?")])
    yield body([hi, answer("Hello."), user("And now?")])
    yield body([hi, answer("Hello.", id="msg_1", status="completed"), user("And now?")])
    yield body([hi, answer("It is ", status="incomplete")])
    yield body([hi, answer("It is ", status="in_progress")])
    yield body([hi, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One"}, {"type": "output_text", "text": "Two"}]}, hi])
    yield body([hi, {"type": "message", "role": "assistant", "content": "It is ", "status": "incomplete"}])
    yield body([hi, {"role": "assistant", "content": "It is ", "status": "incomplete"}])
    yield body([{"type": "message", "role": "user", "content": "It is ", "status": "incomplete"}])
    yield body([{"role": "user", "content": [{"type": "input_text", "text": "It is "}], "status": "incomplete"}])
    yield body([hi, answer("A"), answer("B"), hi])
    yield body([hi, assistant("A"), assistant("B"), hi])
    yield body("Hi", tools=[tool])
    yield body("Hi", tools=[])
    yield body("Hi", tools=[{"type": "function", "name": "noop"}])
    yield body("Hi", tools=[{**tool, "strict": False, "description": None}], tool_choice="none", instructions="S")
    yield body("Hi", tools=[{**tool, "strict": None}], tool_choice="required")
    yield body("Hi", tools=[{"type": "custom", "name": "shell", "description": "Runs a command."}, tool])
    yield body("Hi", tools=[{"type": "namespace", "name": "geo", "description": "Maps.", "tools": [tool]}])
    yield body("Hi", tools=[{"type": "web_search_preview"}])
    yield body([hi, call, output("12 °C")], tools=[tool])
    yield body([hi, call, output("12 °C"), answer("Cold."), hi], tools=[tool])
    yield body([hi, answer("I look."), call, {**call, "call_id": "call_2", "arguments": ""}, output("a"), output("b", call_id="call_2")], tools=[tool])
    yield body([hi, call, answer("Looking."), output("12")], tools=[tool])
    yield body([hi, {**call, "arguments": "no JSON"}, output("12")], tools=[tool])
    yield body([hi, {**call, "arguments": "[1]"}, output("12")], tools=[tool])
    yield body([hi, call, output([{"type": "input_text", "text": "12"}, {"type": "input_text", "text": "°C"}])], tools=[tool])
    yield body([hi, {**call, "namespace": "geo"}, output("12")])
    yield body([hi, {"type": "custom_tool_call", "call_id": "c1", "name": "shell", "input": "ls \"a\"\n"},
                {"type": "custom_tool_call_output", "call_id": "c1", "output": "a b"}])
    yield body([hi, reasoning("Hm."), answer("Yes."), hi])
    yield body([hi, reasoning("Hm."), call, output("12")], tools=[tool])
    yield body([hi, reasoning("A"), reasoning("B"), answer("Yes."), hi])
    yield body([hi, reasoning("x", content=None, summary=[{"type": "summary_text", "text": "Sum."}]), answer("Yes."), hi])
    yield body([hi, reasoning("x", content=None), answer("Yes."), hi])
    yield body([hi, answer("Yes."), reasoning("Late."), hi])
    yield body([hi, reasoning("x", encrypted_content="abc"), answer("Yes."), hi])
    yield body([hi, reasoning("Hm", status="incomplete")])
    yield body("Hi", reasoning={"effort": "high"})
    yield body("Hi", reasoning={"effort": "none"})
    yield body("Hi", reasoning={"effort": "none"}, chat_template_kwargs={"enable_thinking": True})
    yield body("Hi", chat_template_kwargs={"enable_thinking": False})
    yield body([{"type": "item_reference", "id": "msg_1"}, hi])
    yield body([user({"type": "input_image", "image_url": "http://x/y.png"})])
    yield body([])


def chat_api():
    """Yields bodies of chat completions with fields that both other APIs produce."""
    def body(messages, **more):
        return {"model": "tiny", "messages": messages, **more}

    function = {"name": "weather", "parameters": WEATHER}
    hi = user("Hi")
    yield body([hi], reasoning_effort="high")
    yield body([hi], reasoning_effort="none")
    yield body([hi], reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    yield body([hi], tools=[{"type": "function", "function": {**function, "strict": True, "x": 1}, "y": 2}], tool_choice="none")
    yield body([hi], tools=[{"type": "function", "function": {**function, "strict": None, "description": "d"}}], tool_choice="none")
    yield body([{"role": "system", "content": BILLING % "a" + "\nBe brief."}, hi])
    yield body([{"role": "system", "content": [text(BILLING % "a"), text("Be brief.")]}, hi])
    yield body([{"role": "user", "content": BILLING % "a"}])
    yield body([{"role": "developer", "content": "D"}, hi])
    yield body([{"role": "system", "content": "S"}, hi, {"role": "developer", "content": [text("D"), text("E")]}, hi])
    yield body([hi, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "id": "c1", "index": 0, "function": {"name": "weather", "arguments": "{}", "x": 1}, "y": 2}]},
        {"role": "tool", "tool_call_id": "c1", "content": "12"}])
    yield body([hi, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"arguments": "{\"a\": 1}", "name": "weather"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": [text("12"), text("13")]}])


def render(url, api, body):
    request = urllib.request.Request(f"{url}/v1/{api}/render", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        return json.load(urllib.request.urlopen(request))["token_ids"]
    except urllib.error.HTTPError as error:
        print(error.code, api, json.dumps(body)[:160], error.read()[:200], file=sys.stderr)
        return None


if __name__ == "__main__":
    with open(os.path.join(HERE, "rendered.jsonl"), "w") as file:
        for template, url in zip(("tools", "parts"), sys.argv[1:]):
            for api, bodies in (("messages", messages_api()), ("responses", responses_api()), ("chat/completions", chat_api())):
                for body in bodies:
                    line = {"template": template, "api": api, "body": body, "ids": render(url, api, body)}
                    print(json.dumps(line, ensure_ascii=False, separators=(",", ":")), file=file)
