// OpenAI's client for JavaScript and Vercel's AI SDK, as their users write them, against the default model.
import assert from 'node:assert/strict'
import test from 'node:test'

import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { Output, generateText, streamText, tool } from 'ai'
import OpenAI from 'openai'
import { zodResponseFormat } from 'openai/helpers/zod'
import { z } from 'zod'

const baseURL = process.env.PD_SERVE_URL + '/v1'
const model = process.env.PD_SERVE_MODEL_NAME
const apiKey = 'none'
const prompt = 'Which city is the capital of France?'
const messages = [{ role: 'user', content: prompt }]
const City = z.object({ name: z.enum(['Paris', 'Rome']), millions: z.number().int().min(1).max(9) })

test('openai', async () => {
  const client = new OpenAI({ baseURL, apiKey })
  const parsed = await client.chat.completions.parse({ model, messages, response_format: zodResponseFormat(City, 'city') })
  City.parse(parsed.choices[0].message.parsed)
  const stream = await client.chat.completions.create({ model, messages, stream: true, temperature: 0, max_tokens: 30 })
  let text = ''
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? ''
  assert.match(text, /Paris/)
  const response = await client.responses.create({ model, input: prompt, temperature: 0, max_output_tokens: 30 })
  assert.match(response.output_text, /Paris/)
  const look = { type: 'function', function: { name: 'look', parameters: z.toJSONSchema(City) } }
  const called = await client.chat.completions.create({ model, messages, tools: [look], tool_choice: 'required' })
  City.parse(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments))
})

const providers = {
  '@ai-sdk/openai-compatible': createOpenAICompatible({ name: 'pd-serve', baseURL, apiKey, supportsStructuredOutputs: true })(model),
  '@ai-sdk/openai, chats': createOpenAI({ baseURL, apiKey }).chat(model),
  '@ai-sdk/openai, responses': createOpenAI({ baseURL, apiKey }).responses(model),
}
for (const [name, served] of Object.entries(providers)) {
  test(`ai with ${name}`, async () => {
    const asked = { model: served, prompt, temperature: 0 }
    assert.match((await generateText({ ...asked, maxOutputTokens: 30 })).text, /Paris/)
    City.parse((await generateText({ ...asked, output: Output.object({ schema: City }) })).output)
    const tools = { look: tool({ description: 'looks a city up', inputSchema: City }) }
    const { toolCalls } = await generateText({ ...asked, tools, toolChoice: 'required' })
    assert.equal(toolCalls[0].toolName, 'look')
    City.parse(toolCalls[0].input)
    let text = ''
    for await (const part of streamText({ ...asked, maxOutputTokens: 30 }).textStream) text += part
    assert.match(text, /Paris/)
  })
}
