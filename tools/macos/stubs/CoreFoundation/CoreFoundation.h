// What metal-cpp's headers and the launcher name of Apple's CoreFoundation, which zig does not bring: enough to compile against, and no more. Not an
// Apple header.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <TargetConditionals.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef double CFTimeInterval;
typedef signed long CFIndex;
typedef unsigned long CFTypeID;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
typedef const struct __CFAllocator* CFAllocatorRef;
typedef const struct __CFDictionary* CFDictionaryRef;
typedef struct __CFDictionary* CFMutableDictionaryRef;
typedef const struct __CFNumber* CFNumberRef;
typedef unsigned char Boolean;
typedef CFIndex CFNumberType;
enum { kCFNumberIntType = 9 };

#define CFSTR(text) ((CFStringRef)__builtin___CFStringMakeConstantString(text))
extern const CFAllocatorRef kCFAllocatorDefault;

CFStringRef __CFStringMakeConstantString(const char*);
CFTypeRef CFRetain(CFTypeRef);
void CFRelease(CFTypeRef);
CFTypeID CFGetTypeID(CFTypeRef);
CFTypeID CFNumberGetTypeID(void);
Boolean CFNumberGetValue(CFNumberRef, CFNumberType, void*);

#ifdef __cplusplus
}
#endif
