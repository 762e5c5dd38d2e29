-- Chats with a prompt of 2 KB, of which there are ten. The argument is the kind of the response.

local fields = {
    stream = '"stream":true,',
    slow = '"stream":true,"gap_ms":5,',
    whole = '"stream":false,',
}

local bodies = {}
local count = 0
local threads = {}

function setup(thread)
    table.insert(threads, thread)
end

function init(args)
    failed = 0
    for subject = 0, 9 do
        local words = {}
        for word = 0, 250 do
            words[#words + 1] = string.format("%06d-%d", subject, word)
        end
        local prompt = table.concat(words, " "):sub(1, 1900)
        bodies[#bodies + 1] = '{"model":"m",' .. fields[args[1]] .. '"max_tokens":16,"messages":['
            .. '{"role":"system","content":"You are helpful."},'
            .. '{"role":"user","content":"' .. prompt .. '"}]}'
    end
end

function request()
    count = count + 1
    local headers = { ["Content-Type"] = "application/json", ["Authorization"] = "Bearer key" }
    return wrk.format("POST", "/v1/chat/completions", headers, bodies[count % #bodies + 1])
end

function response(status, _, body)
    if status ~= 200 or #body == 0 then
        failed = failed + 1
    end
end

function done(summary)
    local errors = summary.errors
    local failures = errors.connect + errors.read + errors.write + errors.timeout
    for _, thread in ipairs(threads) do
        failures = failures + thread:get("failed")
    end
    print(string.format("result %d %d", summary.requests, failures))
end
