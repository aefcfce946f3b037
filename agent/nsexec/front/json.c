/*
 * json.c: a reader of JSON (RFC 8259) that goes through a text once and keeps nothing.
 *
 * Strings stay as they are encoded: state.json is written by the encoder that prints the answer.  Anything that is not
 * expected sets `bad`, after which every function returns nothing.
 */
#include <string.h>

#include "front.h"

#define DEPTH_MAX 64
#define DIGITS_MAX 18

struct json json_of(struct slice text)
{
	struct json json = {.at = text.at, .end = text.at + text.size};

	return json;
}

static bool reject(struct json *json)
{
	json->bad = true;
	json->at = json->end;
	return false;
}

static char peek(struct json *json)
{
	while (json->at < json->end &&
	       (*json->at == ' ' || *json->at == '\n' || *json->at == '\t' || *json->at == '\r'))
		json->at++;
	return json->at < json->end ? *json->at : '\0';
}

static bool take(struct json *json, char wanted)
{
	if (json->bad || peek(json) != wanted || wanted == '\0')
		return reject(json);
	json->at++;
	return true;
}

bool json_open(struct json *json, char bracket)
{
	if (++json->depth > DEPTH_MAX || !take(json, bracket))
		return reject(json);
	json->first = true;
	return true;
}

/* Go on to the next item; false at the closing bracket, which is taken. */
static bool next(struct json *json, char close)
{
	if (json->bad)
		return false;
	if (peek(json) == close) {
		json->at++;
		json->depth--;
		json->first = false;
		return false;
	}
	if (!json->first && !take(json, ','))
		return false;
	json->first = false;
	return true;
}

bool json_element(struct json *json)
{
	return next(json, ']');
}

bool json_member(struct json *json, struct slice *key)
{
	if (!next(json, '}'))
		return false;
	*key = json_string(json);
	return take(json, ':');
}

struct slice json_string(struct json *json)
{
	struct slice found = {.at = "", .size = 0};
	const char *start;

	if (!take(json, '"'))
		return found;
	start = json->at;
	while (json->at < json->end && *json->at != '"') {
		if ((unsigned char)*json->at < 0x20 || (*json->at == '\\' && json->end - json->at < 2)) {
			reject(json);
			return found;
		}
		json->at += *json->at == '\\' ? 2 : 1;
	}
	if (!take(json, '"'))
		return found;
	found.at = start;
	found.size = (size_t)(json->at - 1 - start);
	return found;
}

/* A whole number of at most 18 digits. */
int64_t json_number(struct json *json)
{
	bool negative = peek(json) == '-';
	int64_t value = 0;
	const char *start;

	if (negative)
		json->at++;
	start = json->at;
	while (json->at < json->end && *json->at >= '0' && *json->at <= '9' && json->at - start < DIGITS_MAX)
		value = value * 10 + (*json->at++ - '0');
	if (json->bad || json->at == start || (*start == '0' && json->at - start > 1) ||
	    (json->at < json->end && strchr("0123456789.eE", *json->at) != NULL)) {
		reject(json);
		return 0;
	}
	return negative ? -value : value;
}

bool json_is_string(struct json *json)
{
	return !json->bad && peek(json) == '"';
}

static void skip_word(struct json *json)
{
	const char *start = json->at;

	while (json->at < json->end && strchr("+-.0123456789abcdefghijklmnopqrstuvwxyzE", *json->at) != NULL &&
	       *json->at != '\0')
		json->at++;
	if (json->at == start)
		reject(json);
}

/* Go past a value; what it is made of is only looked at as far as its end must be found. */
void json_skip(struct json *json)
{
	struct slice key;

	switch (peek(json)) {
	case '{':
		for (json_open(json, '{'); json_member(json, &key);)
			json_skip(json);
		break;
	case '[':
		for (json_open(json, '['); json_element(json);)
			json_skip(json);
		break;
	case '"':
		json_string(json);
		break;
	default:
		skip_word(json);
	}
}

/* Whether the one value that the text holds was read to its end. */
bool json_ended(struct json *json)
{
	return !json->bad && json->depth == 0 && peek(json) == '\0' && json->at == json->end;
}

bool is(struct slice text, const char *word)
{
	return text.size == strlen(word) && memcmp(text.at, word, text.size) == 0;
}

/* The text of an encoded string that holds neither an escape nor anything but ASCII, with a NUL. */
bool plain_text(struct slice encoded, char *into, size_t room)
{
	if (encoded.size >= room)
		return false;
	for (size_t i = 0; i < encoded.size; i++)
		if (encoded.at[i] == '\\' || (unsigned char)encoded.at[i] < 0x20 ||
		    (unsigned char)encoded.at[i] >= 0x7f)
			return false;
	memcpy(into, encoded.at, encoded.size);
	into[encoded.size] = '\0';
	return true;
}
