// ollama-js under the same questions as the others: node peer.mjs SCRIPT URL OPTIONS prints figures as JSON.
import { Ollama } from 'ollama'

const [script, host, given] = process.argv.slice(2)
const options = JSON.parse(given)
const messages = [{ role: 'user', content: 'hi' }]
const newClient = () => new Ollama({ host })

const cpuMicros = () => {
  const { user, system } = process.cpuUsage()
  return user + system
}
const percentile = (values, part) => {
  const ordered = [...values].sort((a, b) => a - b)
  return ordered[Math.min(ordered.length - 1, Math.floor(ordered.length * part))]
}
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
const noted = async (path) => (await fetch(host + path)).json()

async function read(client, model, first = () => {}) {
  let count = 0
  for await (const _ of await client.chat({ model, messages, stream: true })) {
    if (!count) first()
    count += 1
  }
  return count
}

const scripts = {
  async 'streams.py'({ streams, tokens, rate }) {
    const model = rate ? `paced-${tokens}-${rate}` : `burst-${tokens}`
    const client = newClient()
    const firsts = []
    const [cpu, begun] = [cpuMicros(), performance.now()]
    await Promise.all(
      Array.from({ length: streams }, () => {
        const sent = performance.now()
        return read(client, model, () => firsts.push(performance.now() - sent))
      }),
    )
    const wall = (performance.now() - begun) / 1e3
    const figures = {
      cpu_us_per_token: (cpuMicros() - cpu) / (streams * tokens),
      wall_s: wall,
      first_chunk_p50_ms: percentile(firsts, 0.5),
    }
    return rate ? { ...figures, times_the_pace: wall / (tokens / rate) } : figures
  },
  async 'short.py'({ requests }) {
    const client = newClient()
    const [cpu, begun] = [cpuMicros(), performance.now()]
    for (let i = 0; i < requests; i += 1) await client.chat({ model: 'short', messages })
    return {
      cpu_us_per_request: (cpuMicros() - cpu) / requests,
      wall_us_per_request: ((performance.now() - begun) * 1e3) / requests,
    }
  },
  async 'abort.py'({ aborts }) {
    const [seen, took] = [[], []]
    await noted('/left')
    for (let i = 0; i < aborts; i += 1) {
      const client = newClient()
      let come
      const came = new Promise((resolve) => (come = resolve))
      const reading = read(client, 'silent', come).catch(() => {})
      await came
      await pause(2)
      const begun = process.hrtime.bigint() // the machine's monotonic clock, as the server's
      client.abort()
      took.push(Number(process.hrtime.bigint() - begun) / 1e3)
      await reading
      let left = []
      while (!left.length) {
        await pause(2)
        left = await noted('/left')
      }
      seen.push((left[0] - Number(begun)) / 1e3)
    }
    return {
      seen_p50_us: percentile(seen, 0.5),
      seen_p99_us: percentile(seen, 0.99),
      call_p50_us: percentile(took, 0.5),
      call_p99_us: percentile(took, 0.99),
    }
  },
}

await newClient().chat({ model: 'short', messages })
await read(newClient(), 'burst-10')
console.log(JSON.stringify(await scripts[script](options)))
