"""The ledger's transitions as Redis scripts: each is atomic, and none can be half done by a process that dies.

KEYS[1] is the key prefix of the model (see `hogwild.tasks.keys`); the other keys are derived in the script, which is
why this needs one Redis node, as Celery's broker does too. Time is Redis' own, in seconds, so that jobs and debounce
share one clock. Every script that changes a job may be sent twice by a client that lost the reply: it recognises the
second time (by job id, by `call`, by state) and answers as it did the first time.
"""

PRELUDE = """
local P = KEYS[1]
local function now()
  local t = redis.call('TIME')
  return string.format('%d.%06d', t[1], t[2])
end
local function job_key(id) return P .. 'job:' .. id end
local function get(id, field) return redis.call('HGET', job_key(id), field) end
local function event(id, kind, data)
  redis.call('XADD', P .. 'events:' .. id, 'MAXLEN', '~', 2000, '*', 'event', kind, 'data', data)
end
-- A stream's node is made 4 kB large for events to come; of jobs that wait or have ended, many are kept and few come.
local function compact(id)
  local key = P .. 'events:' .. id
  redis.call('RESTORE', key, 0, redis.call('DUMP', key), 'REPLACE')
end
local function move(id, from, to)
  local seq = get(id, 'seq')
  redis.call('ZREM', P .. 'state:' .. from, id)
  redis.call('ZADD', P .. 'state:' .. to, seq, id)
  redis.call('HSET', job_key(id), 'state', to)
end
local function count(name, n) redis.call('HINCRBY', P .. 'counters', name, n) end
-- Samples are stored once for all jobs that have the same; nobody reads those of a job that has ended.
local function drop_payload(id)
  local digest = get(id, 'payload')
  if not digest or digest == '' then return end
  redis.call('HSET', job_key(id), 'payload', '')
  if redis.call('HINCRBY', P .. 'payload-refs', digest, -1) > 0 then return end
  redis.call('HDEL', P .. 'payload-refs', digest)
  redis.call('DECRBY', P .. 'payload-bytes', redis.call('STRLEN', P .. 'payload:' .. digest))
  redis.call('DEL', P .. 'payload:' .. digest)
end
local function close(id, from, to, err, t)
  move(id, from, to)
  drop_payload(id)
  redis.call('HSET', job_key(id), 'finished_at', t, 'paused', '0', 'worker', '')
  if err ~= '' then redis.call('HSET', job_key(id), 'error', err) end
  redis.call('ZADD', P .. 'retention', t, id)
  count('jobs_' .. to, 1)
  if err == '' then err = 'null' end
  event(id, to, '{"error":' .. err .. '}')
  compact(id)
end
local function final(state) return state == 'succeeded' or state == 'failed' or state == 'cancelled' end
-- The lease is good while the job runs under this fence; anything else means that another worker took it over.
local function held(id, fence) return get(id, 'state') == 'running' and get(id, 'fence') == fence end
"""

# ARGV: id, queue key, message id, message, payload hash, payload, config, metadata, priority, samples, tokens,
#       idempotency hash, body hash, idempotency seconds, queue limit, api key name, kind, extra,
#       most bytes of samples
SUBMIT = PRELUDE + """
local id = ARGV[1]
if redis.call('EXISTS', job_key(id)) == 1 then return {'created', id} end
local idem = ARGV[12] ~= '' and (P .. 'idem:' .. ARGV[12]) or nil
if idem then
  local known = redis.call('HMGET', idem, 'body', 'job')
  if known[1] then
    if known[1] ~= ARGV[13] then return {'idempotency', known[2]} end
    if redis.call('EXISTS', job_key(known[2])) == 1 then return {'existing', known[2]} end
  end
end
local waiting = redis.call('ZCARD', P .. 'state:queued')
if waiting >= tonumber(ARGV[15]) then return {'full', tostring(waiting)} end
local bytes = tonumber(redis.call('GET', P .. 'payload-bytes') or '0')
if bytes > 0 and bytes + #ARGV[6] > tonumber(ARGV[19]) and redis.call('EXISTS', P .. 'payload:' .. ARGV[5]) == 0 then
  return {'full-of-samples', tostring(bytes)}
end
local t = now()
local seq = redis.call('INCR', P .. 'seq')
if redis.call('SET', P .. 'payload:' .. ARGV[5], ARGV[6], 'NX') then
  redis.call('INCRBY', P .. 'payload-bytes', #ARGV[6])
end
redis.call('HINCRBY', P .. 'payload-refs', ARGV[5], 1)
redis.call('HSET', job_key(id), 'id', id, 'seq', seq, 'state', 'queued', 'created_at', t, 'queued_at', t,
  'published_at', t, 'message', ARGV[3], 'payload', ARGV[5], 'config', ARGV[7], 'metadata', ARGV[8],
  'priority', ARGV[9], 'samples', ARGV[10], 'tokens', ARGV[11], 'api_key', ARGV[16], 'kind', ARGV[17],
  'begun', 0, 'applied', 0, 'interrupted', 0, 'attempts', 0, 'fence', 0, 'requested', 'run', 'paused', '0')
if ARGV[18] ~= '' then redis.call('HSET', job_key(id), 'extra', ARGV[18]) end
redis.call('ZADD', P .. 'jobs', seq, id)
redis.call('ZADD', P .. 'kind:' .. ARGV[17], seq, id)
redis.call('ZADD', P .. 'state:queued', seq, id)
count('jobs_accepted', 1)
event(id, 'queued', '{}')
compact(id)
if idem then
  redis.call('HSET', idem, 'body', ARGV[13], 'job', id)
  redis.call('EXPIRE', idem, ARGV[14])
end
redis.call('LPUSH', ARGV[2], ARGV[4])
return {'created', id}
"""

SETTLING = """
local function orphan(owner, worker) return owner == worker or redis.call('EXISTS', P .. 'alive:' .. owner) == 0 end
-- A step was begun and its end never recorded: the weights know, their version moved on iff it was applied. Asked of
-- every orphaned job before this worker moves the version, by a step or a rollback.
local function settle(worker, weights)
  for _, orphaned in ipairs(redis.call('ZRANGE', P .. 'state:running', 0, -1)) do
    local k = job_key(orphaned)
    local s = redis.call('HMGET', k, 'begun', 'applied', 'interrupted', 'begun_version', 'worker')
    local begun, applied, interrupted = tonumber(s[1]), tonumber(s[2]), tonumber(s[3])
    if begun > applied + interrupted and orphan(s[5], worker) then
      local before = tonumber(s[4] or '')
      if weights ~= '' and before and tonumber(weights) > before then
        redis.call('HSET', k, 'applied', applied + 1, 'weight_version_last', before + 1, 'last_step', begun - 1)
        redis.call('HSETNX', k, 'weight_version_first', before + 1)
        count('steps_applied', 1)
        event(orphaned, 'step',
          string.format('{"step":%d,"weight_version":%d,"recovered":true}', begun - 1, before + 1))
      else
        redis.call('HSET', k, 'interrupted', interrupted + 1)
        count('steps_interrupted', 1)
        event(orphaned, 'interrupted', string.format('{"step":%d}', begun - 1))
      end
    end
  end
end
"""

# ARGV: worker id, weight version. For a worker that runs no job and has just attached.
SETTLE = PRELUDE + SETTLING + """
settle(ARGV[1], ARGV[2])
return 'ok'
"""

# ARGV: id, worker id, call, weight version or '', barren attempts allowed, error for the poison job
CLAIM = PRELUDE + SETTLING + """
local id, worker, weights = ARGV[1], ARGV[2], ARGV[4]
local key = job_key(id)
local f = redis.call('HMGET', key, 'state', 'worker', 'claim_call')
if not f[1] or final(f[1]) then return nil end
if f[1] == 'running' and f[3] == ARGV[3] then return redis.call('HGETALL', key) end
settle(worker, weights)
f = redis.call('HMGET', key, 'state', 'worker', 'begun', 'applied', 'requested', 'attempts', 'applied_at_claim',
  'barren')
local state = f[1]
if state == 'running' and not orphan(f[2], worker) then return nil end
if state == 'queued' and f[5] == 'pause' then return nil end
local t = now()
if f[5] == 'cancel' then close(id, state, 'cancelled', '', t); return nil end
if f[5] == 'pause' then
  -- Its worker died while the job was running or paused: it waits, without a worker, until it is resumed.
  move(id, state, 'queued')
  redis.call('HSET', key, 'paused', '1', 'worker', '', 'queued_at', t)
  event(id, 'paused', '{}')
  return nil
end
local barren = 0
if tonumber(f[6]) > 0 and f[7] == f[4] then barren = tonumber(f[8]) + 1 end
if state ~= 'running' then move(id, state, 'running') end
if barren >= tonumber(ARGV[5]) then close(id, 'running', 'failed', ARGV[6], t); return nil end
redis.call('HINCRBY', key, 'fence', 1)
redis.call('HINCRBY', key, 'attempts', 1)
redis.call('HSETNX', key, 'started_at', t)
redis.call('HSET', key, 'worker', worker, 'claim_call', ARGV[3], 'claimed_at', t, 'paused', '0',
  'applied_at_claim', f[4], 'barren', barren)
event(id, 'running', '{"first_step":' .. f[3] .. ',"attempt":' .. get(id, 'attempts') .. '}')
return redis.call('HGETALL', key)
"""

# ARGV: id, fence, steps of the plan, size of its packs or '', its account (JSON) or ''
PLANNED = PRELUDE + """
if not held(ARGV[1], ARGV[2]) then return 'stale' end
redis.call('HSET', job_key(ARGV[1]), 'steps', ARGV[3], 'pack_tokens', ARGV[4], 'plan', ARGV[5])
return 'ok'
"""

# ARGV: id, fence, step, call, weight version before the step or ''
BEGIN_STEP = PRELUDE + """
local id, step = ARGV[1], tonumber(ARGV[3])
if not held(id, ARGV[2]) then return 'stale' end
local f = redis.call('HMGET', job_key(id), 'begun', 'begun_call', 'applied', 'interrupted')
local begun = tonumber(f[1])
if step == begun - 1 and f[2] == ARGV[4] then return 'ok' end
if step ~= begun then return 'order:' .. begun end
if begun ~= tonumber(f[3]) + tonumber(f[4]) then return 'open:' .. (begun - 1) end
redis.call('HSET', job_key(id), 'begun', step + 1, 'begun_call', ARGV[4], 'begun_version', ARGV[5])
if step == 0 then event(id, 'begun', '{"step":0}') end
return 'ok'
"""

# ARGV: id, fence, step, weight version, loss, tokens, seconds, steps of the plan or '',
#       event data, 1: it is in the weights
APPLIED = PRELUDE + """
local id, step = ARGV[1], tonumber(ARGV[3])
if not held(id, ARGV[2]) then return 'stale' end
local key = job_key(id)
local f = redis.call('HMGET', key, 'begun', 'applied', 'interrupted', 'last_step')
local begun = tonumber(f[1])
if f[4] == ARGV[3] then return 'ok' end
if step ~= begun - 1 or begun ~= tonumber(f[2]) + tonumber(f[3]) + 1 then return 'order:' .. begun end
redis.call('HINCRBY', key, 'applied', 1)
local written = ARGV[10] == '1'  -- no: its gradients were not finite, and the weights are as they were
if written then
  redis.call('HSETNX', key, 'weight_version_first', ARGV[4])
  redis.call('HSET', key, 'weight_version_last', ARGV[4])
end
redis.call('HSETNX', key, 'loss_first', ARGV[5])
redis.call('HSET', key, 'last_step', ARGV[3], 'loss_last', ARGV[5])
redis.call('HINCRBY', key, 'tokens_trained', ARGV[6])
redis.call('HINCRBYFLOAT', key, 'seconds', ARGV[7])
if ARGV[8] ~= '' then redis.call('HSET', key, 'steps', ARGV[8]) end
redis.call('RPUSH', P .. 'losses:' .. id, ARGV[5])
redis.call('LTRIM', P .. 'losses:' .. id, -10000, -1)
event(id, 'step', ARGV[9])
if not written then
  count('steps_dropped', 1)
  return 'ok'
end
count('steps_applied', 1)
count('tokens_trained', ARGV[6])
redis.call('HINCRBYFLOAT', P .. 'counters', 'step_seconds_sum', ARGV[7])
local seconds = tonumber(ARGV[7])
for _, bound in ipairs({'0.1', '0.25', '0.5', '1', '2.5', '5', '10', '30', '60'}) do
  if seconds <= tonumber(bound) then count('step_seconds_le_' .. bound, 1) end
end
redis.call('HSET', P .. 'counters', 'loss_last', ARGV[5], 'weight_version', ARGV[4])
return 'ok'
"""

GIVING_BACK = """
local function give_back(id, paused)
  move(id, 'running', 'queued')
  redis.call('HSET', job_key(id), 'worker', '', 'queued_at', now(), 'paused', paused and '1' or '0')
  redis.call('HINCRBY', job_key(id), 'barren', -1)  -- no worker died in this attempt: the next claim adds nothing
  event(id, paused and 'paused' or 'queued', '{}')
end
"""

# ARGV: id, fence. Puts a job back between two steps; beat's tick or the next worker's start publishes it. A pause or a
# cancellation that came too late for a look between steps is done here: nobody else would.
RELEASE = PRELUDE + GIVING_BACK + """
local id = ARGV[1]
local state, want = get(id, 'state'), get(id, 'requested')
if get(id, 'fence') == ARGV[2] and (state == 'queued' or state == 'cancelled') then return 'ok' end
if not held(id, ARGV[2]) then return 'stale' end
if want == 'cancel' then close(id, 'running', 'cancelled', '', now()) else give_back(id, want == 'pause') end
return 'ok'
"""

# ARGV: id, fence, state, error JSON or ''
FINISH = PRELUDE + """
local id = ARGV[1]
if get(id, 'fence') == ARGV[2] and get(id, 'state') == ARGV[3] then return 'ok' end
if not held(id, ARGV[2]) then return 'stale' end
local key = job_key(id)
local f = redis.call('HMGET', key, 'begun', 'applied', 'interrupted')
if tonumber(f[1]) > tonumber(f[2]) + tonumber(f[3]) then
  redis.call('HINCRBY', key, 'interrupted', 1)
  count('steps_interrupted', 1)
  event(id, 'interrupted', '{"step":' .. (tonumber(f[1]) - 1) .. '}')
end
close(id, 'running', ARGV[3], ARGV[4], now())
return 'ok'
"""

# ARGV: id, fence. Gives a job that is to pause back, between two steps, so that the worker can run another.
PARK = PRELUDE + GIVING_BACK + """
local id = ARGV[1]
if get(id, 'fence') == ARGV[2] and get(id, 'state') == 'queued' then return 'ok' end
if not held(id, ARGV[2]) then return 'stale' end
if get(id, 'requested') ~= 'pause' then return 'go-on' end
give_back(id, true)
return 'ok'
"""

# ARGV: id, 'cancel' | 'pause' | 'run', queue key, message id, message (for a paused job that has to be published again)
REQUEST = PRELUDE + """
local id, want = ARGV[1], ARGV[2]
local key = job_key(id)
local f = redis.call('HMGET', key, 'state', 'requested', 'paused')
local state = f[1]
if not state then return 'missing' end
if final(state) then
  if want == 'cancel' and state == 'cancelled' then return 'ok' end
  return 'final:' .. state
end
if f[2] == 'cancel' and want ~= 'cancel' then return 'cancelling' end
if f[2] == want then return 'ok' end
redis.call('HSET', key, 'requested', want)
if state == 'queued' then
  if want == 'cancel' then
    close(id, 'queued', 'cancelled', '', now())
  elseif want == 'pause' then
    redis.call('HSET', key, 'paused', '1')
    event(id, 'paused', '{}')
  else
    local t = now()
    redis.call('HSET', key, 'paused', '0', 'queued_at', t, 'published_at', t, 'message', ARGV[4])
    event(id, 'resumed', '{}')
    redis.call('LPUSH', ARGV[3], ARGV[5])
    return 'published'
  end
else
  event(id, want .. '_requested', '{}')
end
return 'ok'
"""

# ARGV: id, message id that was looked for and not found, worker that asks or '', seconds of grace, queue key, message
#       id, message. Publishes a job again whose message is gone or lies with a dead worker.
REPUBLISH = PRELUDE + """
local id = ARGV[1]
local f = redis.call('HMGET', job_key(id), 'state', 'message', 'requested', 'worker', 'published_at')
if not f[1] or final(f[1]) or f[2] ~= ARGV[2] then return 0 end
if f[1] == 'queued' and f[3] == 'pause' then return 0 end
if f[1] == 'running' and f[4] ~= ARGV[3] and redis.call('EXISTS', P .. 'alive:' .. f[4]) == 1 then return 0 end
local t = now()
if tonumber(t) - tonumber(f[5]) < tonumber(ARGV[4]) and tonumber(t) >= tonumber(f[5]) then return 0 end
redis.call('HSET', job_key(id), 'message', ARGV[6], 'published_at', t)
redis.call('LPUSH', ARGV[5], ARGV[7])
count('jobs_republished', 1)
return 1
"""

# ARGV: seconds of retention, most jobs to forget. Returns how many were forgotten.
PURGE = PRELUDE + """
local before = tonumber(now()) - tonumber(ARGV[1])
local ids = redis.call('ZRANGEBYSCORE', P .. 'retention', '-inf', before, 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local f = redis.call('HMGET', job_key(id), 'state', 'kind')
  drop_payload(id)
  redis.call('DEL', job_key(id), P .. 'losses:' .. id, P .. 'events:' .. id)
  redis.call('ZREM', P .. 'jobs', id)
  if f[2] then redis.call('ZREM', P .. 'kind:' .. f[2], id) end
  redis.call('ZREM', P .. 'retention', id)
  if f[1] then redis.call('ZREM', P .. 'state:' .. f[1], id) end
end
return #ids
"""
