// What metal-cpp's headers name of Apple's CoreFoundation, which zig does not bring: enough to compile against, and no more. Not an Apple header.
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

CFStringRef __CFStringMakeConstantString(const char*);
CFTypeRef CFRetain(CFTypeRef);
void CFRelease(CFTypeRef);

#ifdef __cplusplus
}
#endif
