/*
 * tlv.c: read the messages of the init pipe, in netlink framing (struct nlmsghdr, then struct nlattr each padded to 4
 * bytes).
 *
 * No length is trusted before it is checked (CVE-2021-43784): an attribute has at least its header and fits in the rest
 * of the message, numbers have their exact size, text ends in its only NUL, padding is part of the message.  Short
 * reads are continued; a message has at most `limit` bytes.  Anything else is an error.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "nsexec.h"

#define HEADER_SIZE 16u
#define ATTRIBUTE_HEADER 4u
#define ALIGN4(n) (((n) + 3u) & ~(size_t)3u)

static void read_fully(int fd, uint8_t *into, size_t size)
{
	while (size > 0) {
		ssize_t got = read(fd, into, size);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			fail_errno("bootstrap", "init pipe", NULL);
		if (got == 0)
			fail(EBADMSG, "bootstrap", "init pipe", "a message ends before its length");
		into += got;
		size -= (size_t)got;
	}
}

struct cursor read_message(struct inbox *inbox, int fd, uint16_t type, size_t limit)
{
	uint32_t length;
	uint16_t got_type;
	uint8_t *message = inbox->bytes + inbox->used;
	size_t room = sizeof(inbox->bytes) - inbox->used;
	struct cursor cursor;

	if (room < HEADER_SIZE)
		fail(EMSGSIZE, "bootstrap", "message", NULL);
	read_fully(fd, message, HEADER_SIZE);
	memcpy(&length, message, sizeof(length));
	memcpy(&got_type, message + 4, sizeof(got_type));
	if (got_type != type)
		fail(EBADMSG, "bootstrap", "message", "an unexpected message type");
	if (length < HEADER_SIZE)
		fail(EBADMSG, "bootstrap", "message", "a length shorter than the header");
	if (length > limit || ALIGN4((size_t)length) > room)
		fail(EMSGSIZE, "bootstrap", "message", "longer than the limit");
	read_fully(fd, message + HEADER_SIZE, length - HEADER_SIZE);
	inbox->used += ALIGN4((size_t)length);
	cursor.at = message + HEADER_SIZE;
	cursor.end = message + length;
	return cursor;
}

bool next_attribute(struct cursor *cursor, struct attribute *out)
{
	size_t left = (size_t)(cursor->end - cursor->at);
	uint16_t length;

	if (left == 0)
		return false;
	if (left < ATTRIBUTE_HEADER)
		fail(EBADMSG, "bootstrap", "attribute", "a truncated header");
	memcpy(&length, cursor->at, sizeof(length));
	memcpy(&out->type, cursor->at + 2, sizeof(out->type));
	if (length < ATTRIBUTE_HEADER)
		fail(EBADMSG, "bootstrap", "attribute", "a length shorter than the header");
	if (length > left || ALIGN4((size_t)length) > left)
		fail(EBADMSG, "bootstrap", "attribute", "longer than the rest of the message");
	out->size = length - ATTRIBUTE_HEADER;
	out->data = cursor->at + ATTRIBUTE_HEADER;
	cursor->at += ALIGN4((size_t)length);
	return true;
}

struct cursor attribute_cursor(const struct attribute *a)
{
	struct cursor cursor = {.at = a->data, .end = a->data + a->size};
	return cursor;
}

uint32_t attribute_u32(const struct attribute *a)
{
	uint32_t value;

	if (a->size != sizeof(value))
		fail(EBADMSG, "bootstrap", "attribute", "a number that is not four bytes");
	memcpy(&value, a->data, sizeof(value));
	return value;
}

/* One byte and three bytes of padding that count as payload, as runc encodes it. */
bool attribute_bool(const struct attribute *a)
{
	if (a->size != 4)
		fail(EBADMSG, "bootstrap", "attribute", "a boolean that is not four bytes");
	if (a->data[0] > 1 || a->data[1] != 0 || a->data[2] != 0 || a->data[3] != 0)
		fail(EBADMSG, "bootstrap", "attribute", "a boolean that is neither 0 nor 1");
	return a->data[0] == 1;
}

const char *attribute_text(const struct attribute *a)
{
	struct cursor cursor = attribute_cursor(a);
	const char *text = read_text(&cursor, "attribute");

	read_end(&cursor, "attribute");
	return text;
}

void read_bytes(struct cursor *cursor, void *into, size_t size, const char *what)
{
	if ((size_t)(cursor->end - cursor->at) < size)
		fail(EBADMSG, "bootstrap", what, "too short");
	memcpy(into, cursor->at, size);
	cursor->at += size;
}

const char *read_text(struct cursor *cursor, const char *what)
{
	const uint8_t *text = cursor->at;
	size_t left = (size_t)(cursor->end - cursor->at);
	const uint8_t *nul = left == 0 ? NULL : memchr(text, 0, left);

	if (nul == NULL)
		fail(EBADMSG, "bootstrap", what, "text without a NUL");
	cursor->at = nul + 1;
	return (const char *)text;
}

void read_end(const struct cursor *cursor, const char *what)
{
	if (cursor->at != cursor->end)
		fail(EBADMSG, "bootstrap", what, "trailing bytes");
}
