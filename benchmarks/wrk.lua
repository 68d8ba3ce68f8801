-- Sends the bodies of files in turn; prints what came of it as one line of JSON.
-- Arguments: seconds between two requests of a connection (0: none), headers as "Name: value", "--", the files.
-- Where there is a pause, answers are also counted by status, for which wrk has to hand every one of them to Lua.

local threads = {}
local requests, turn = {}, 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  wrk.method = "POST"
  local place = 2
  while args[place] ~= "--" do
    local name, value = args[place]:match("^([^:]+): (.*)$")
    wrk.headers[name] = value
    place = place + 1
  end
  for index = place + 1, #args do
    local file = assert(io.open(args[index], "rb"))
    table.insert(requests, wrk.format(nil, nil, nil, file:read("*a")))
    file:close()
  end
  local pause = tonumber(args[1])
  statuses = ""
  if pause > 0 then
    local counts = {}
    delay = function() return 1000 * pause end
    response = function(status)
      counts[status] = (counts[status] or 0) + 1
      statuses = ""
      for code, count in pairs(counts) do
        statuses = statuses .. string.format('%s"%d": %d', statuses == "" and "" or ", ", code, count)
      end
    end
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\nRESULT {"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "refused": %d, "broken": %d, '
      .. '"statuses": {%s}}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout, threads[1]:get("statuses")))
end
